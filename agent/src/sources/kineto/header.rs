//! The fields of a trace beside its events.

use serde::Deserialize;

/// What is known of the run.
#[derive(Debug, Default)]
pub(super) struct Header {
    pub(super) rank: Option<u32>,
    pub(super) world: u32,
    pub(super) host: String,
    /// Device names by index.
    pub(super) devices: Vec<(u32, String)>,
    /// What to add to times for `CLOCK_REALTIME`, ns.
    pub(super) base_ns: Option<u64>,
}

#[derive(Deserialize)]
struct Distributed {
    rank: Option<u32>,
    world_size: Option<u32>,
}

#[derive(Deserialize)]
struct Device {
    id: u32,
    name: String,
}

impl Header {
    /// Whether the field is of use.
    pub(super) fn wants(key: &str) -> bool {
        matches!(
            key,
            "distributedInfo" | "deviceProperties" | "baseTimeNanoseconds" | "host_name"
        )
    }

    /// Takes a field. A value of another shape says nothing.
    pub(super) fn set(&mut self, key: &str, value: &[u8]) {
        match key {
            "distributedInfo" => {
                if let Ok(info) = serde_json::from_slice::<Distributed>(value) {
                    self.rank = info.rank;
                    self.world = info.world_size.unwrap_or(0);
                }
            }
            "deviceProperties" => {
                let devices = serde_json::from_slice::<Vec<Device>>(value).unwrap_or_default();
                self.devices = devices
                    .into_iter()
                    .map(|device| (device.id, device.name))
                    .collect();
            }
            "baseTimeNanoseconds" => self.base_ns = serde_json::from_slice(value).ok(),
            "host_name" => self.host = serde_json::from_slice(value).unwrap_or_default(),
            _ => {}
        }
    }

    pub(super) fn device(&self, id: u32) -> String {
        let known = self.devices.iter().find(|(known, _)| *known == id);
        known.map(|(_, name)| name.clone()).unwrap_or_default()
    }
}
