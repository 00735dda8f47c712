#![expect(clippy::unwrap_used, reason = "tests")]

use std::mem::{offset_of, size_of};

use nvml_wrapper_sys::bindings as real;

use super::layout;

#[test]
fn structures_have_the_real_layout() {
    assert_eq!(size_of::<layout::PciInfo>(), size_of::<real::nvmlPciInfo_t>());
    assert_eq!(
        offset_of!(layout::PciInfo, bus_id),
        offset_of!(real::nvmlPciInfo_t, busId)
    );
    assert_eq!(
        size_of::<layout::Utilization>(),
        size_of::<real::nvmlUtilization_t>()
    );
    assert_eq!(
        size_of::<layout::ProcessInfo>(),
        size_of::<real::nvmlProcessInfo_t>()
    );
    assert_eq!(
        size_of::<layout::ProcessUtilizationSample>(),
        size_of::<real::nvmlProcessUtilizationSample_t>()
    );
    assert_eq!(size_of::<layout::Memory>(), size_of::<real::nvmlMemory_t>());
    assert_eq!(size_of::<layout::MemoryV2>(), size_of::<real::nvmlMemory_v2_t>());
    assert_eq!(
        size_of::<layout::FieldValue>(),
        size_of::<real::nvmlFieldValue_t>()
    );
    assert_eq!(
        offset_of!(layout::FieldValue, value),
        offset_of!(real::nvmlFieldValue_t, value)
    );
    assert_eq!(size_of::<layout::GpmMetric>(), size_of::<real::nvmlGpmMetric_t>());
    assert_eq!(
        offset_of!(layout::GpmMetricsGet, metrics),
        offset_of!(real::nvmlGpmMetricsGet_t, metrics)
    );
    assert_eq!(
        size_of::<layout::GpmSupport>(),
        size_of::<real::nvmlGpmSupport_t>()
    );
    assert_eq!(size_of::<layout::EventData>(), size_of::<real::nvmlEventData_t>());
}

#[test]
fn texts_that_do_not_fit_are_refused() {
    let mut buffer = [1; 4];
    // SAFETY: the buffer has as many bytes as said.
    let status = unsafe { super::answer_text(buffer.as_mut_ptr(), 4, Ok("four".into())) };
    assert_eq!(status, super::INSUFFICIENT_SIZE, "no room for the closing zero");
    // SAFETY: as above.
    let status = unsafe { super::answer_text(buffer.as_mut_ptr(), 4, Ok("abc".into())) };
    assert_eq!(status, super::SUCCESS);
    assert_eq!(buffer.map(|byte| u8::try_from(byte).unwrap()), *b"abc\0");
}

#[test]
fn handles_name_gpus_only_after_initialisation() {
    assert_eq!(
        super::device(super::handle(0)).map(|_| ()),
        Err(super::UNINITIALIZED)
    );
    assert_eq!(super::stop(), super::UNINITIALIZED);
}
