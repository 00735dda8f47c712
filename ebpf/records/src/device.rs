//! What the kernel's own events tell of devices.

use crate::layout::record;

/// Bytes kept of a device's name, with the zero that ends it.
pub const NAME_BYTES: usize = 32;
/// Bytes kept of a message, with the zero that ends it.
pub const MESSAGE_BYTES: usize = 128;

/// [`DeviceError::kind`].
pub mod kind {
    /// `ras:aer_event`.
    pub const PCIE: u32 = 1;
    /// `nvidia:nvidia_dev_xid`.
    pub const XID: u32 = 2;
}

record! {
    /// An error of a device at one moment.
    pub struct DeviceError: 184 {
        /// Name of the device, ended by zero.
        pub device: [u8; NAME_BYTES] = 0,
        /// Message beside it, ended by zero.
        pub message: [u8; MESSAGE_BYTES] = 32,
        /// When.
        pub at_ns: u64 = 160,
        /// See [`kind`].
        pub kind: u32 = 168,
        /// Status register, or code of the fault.
        pub code: u32 = 172,
        /// Severity as in the event; 0 where it has none.
        pub severity: u32 = 176,
        /// Nothing.
        pub spare: u32 = 180,
    }
}
