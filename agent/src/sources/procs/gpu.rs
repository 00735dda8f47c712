//! Which GPU a process uses.

use super::GpuView;
use super::environ::{Declared, VisibleDevice};

/// The GPU's index: what the driver says is exact; what the environment says fills in until the driver knows the
/// process, and decides when the driver lists it on several GPUs.
pub(super) fn gpu_of(pid: u32, declared: &Declared, view: &GpuView) -> Option<u32> {
    let listed: Vec<u32> = view
        .processes
        .iter()
        .flatten()
        .filter_map(|&(gpu, listed_pid)| (listed_pid == pid).then_some(gpu))
        .collect();
    let by_environment = declared_gpu(declared, view);
    match listed.as_slice() {
        [] => by_environment,
        [gpu] => Some(*gpu),
        several => by_environment
            .filter(|gpu| several.contains(gpu))
            .or_else(|| several.iter().min().copied()),
    }
}

/// Whether the driver lists the process on any GPU; `None` when the driver cannot tell.
pub(super) fn is_listed(pid: u32, view: &GpuView) -> Option<bool> {
    view.processes
        .as_ref()
        .map(|processes| processes.iter().any(|&(_, listed)| listed == pid))
}

fn declared_gpu(declared: &Declared, view: &GpuView) -> Option<u32> {
    let local = declared.local_rank.and_then(|rank| usize::try_from(rank).ok());
    let index = match declared.visible.as_deref() {
        None => declared.local_rank?,
        Some([only]) => index_of(only, view)?,
        Some(visible) => index_of(visible.get(local?)?, view)?,
    };
    (view.devices.is_empty() || view.devices.iter().any(|device| device.index == index)).then_some(index)
}

fn index_of(device: &VisibleDevice, view: &GpuView) -> Option<u32> {
    let uuid = match device {
        VisibleDevice::Index(index) => return Some(*index),
        VisibleDevice::Uuid(uuid) => uuid,
        VisibleDevice::Mig { gpu_uuid } => gpu_uuid.as_ref()?,
    };
    // An abbreviated UUID is valid when it names one device.
    let mut named = view
        .devices
        .iter()
        .filter(|device| device.uuid.starts_with(uuid.as_str()));
    let first = named.next()?;
    named.next().is_none().then_some(first.index)
}

#[cfg(test)]
mod tests {
    use super::super::GpuIdentity;
    use super::*;

    fn view(processes: Option<&[(u32, u32)]>) -> GpuView {
        let devices = ["GPU-aa11", "GPU-aa22", "GPU-bb33"];
        GpuView {
            devices: devices
                .iter()
                .zip(0..)
                .map(|(uuid, index)| GpuIdentity {
                    index,
                    uuid: (*uuid).to_owned(),
                    ..GpuIdentity::default()
                })
                .collect(),
            processes: processes.map(<[_]>::to_vec),
        }
    }

    fn declared(visible: Option<Vec<VisibleDevice>>, local_rank: Option<u32>) -> Declared {
        Declared {
            visible,
            local_rank,
            ..Declared::default()
        }
    }

    #[test]
    fn the_driver_is_believed_over_the_environment() {
        let environment = declared(None, Some(1));
        assert_eq!(gpu_of(7, &environment, &view(Some(&[(2, 7)]))), Some(2));
        assert_eq!(gpu_of(7, &environment, &view(Some(&[(2, 8)]))), Some(1));
        assert_eq!(gpu_of(7, &environment, &view(Some(&[(0, 7), (1, 7)]))), Some(1));
        assert_eq!(
            gpu_of(7, &declared(None, None), &view(Some(&[(2, 7), (1, 7)]))),
            Some(1)
        );
        assert_eq!(is_listed(7, &view(None)), None);
    }

    #[test]
    fn by_environment() {
        let index = |list: &[u32]| Some(list.iter().map(|&index| VisibleDevice::Index(index)).collect());
        let uuid = |text: &str| Some(vec![VisibleDevice::Uuid(text.to_owned())]);
        let cases = [
            (declared(index(&[2, 1]), Some(1)), Some(1)),
            (declared(index(&[2]), Some(1)), Some(2)),
            (declared(index(&[2, 1]), Some(5)), None),
            (declared(index(&[2, 1]), None), None),
            (declared(index(&[]), Some(0)), None),
            (declared(index(&[9]), Some(0)), None),
            (declared(None, Some(9)), None),
            (declared(None, None), None),
            (declared(uuid("GPU-bb"), None), Some(2)),
            (declared(uuid("GPU-aa"), None), None),
            (
                declared(
                    Some(vec![VisibleDevice::Mig {
                        gpu_uuid: Some("GPU-aa22".to_owned()),
                    }]),
                    None,
                ),
                Some(1),
            ),
            (
                declared(Some(vec![VisibleDevice::Mig { gpu_uuid: None }]), None),
                None,
            ),
        ];
        for (environment, expected) in cases {
            assert_eq!(gpu_of(7, &environment, &view(None)), expected, "{environment:?}");
        }
    }
}
