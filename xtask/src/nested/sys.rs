//! Reading the time stamp counter.
#![expect(
    unsafe_code,
    reason = "JUSTIFICATION: one processor instruction has no safe interface; the block below says \
              why it is sound"
)]

/// The processor's time stamp counter.
#[cfg(target_arch = "x86_64")]
pub(super) fn time_stamp() -> u64 {
    // SAFETY: the instruction reads a counter that every x86-64 processor has, and Linux lets every
    // process read it.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// There is none; set-up refuses such a host before anyone asks.
#[cfg(not(target_arch = "x86_64"))]
pub(super) fn time_stamp() -> u64 {
    0
}
