//! Quantities as types, so a number never travels without its unit.

/// Mebibytes (1,048,576 bytes). The wire calls this `memoryMB`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MiB(pub u32);

impl MiB {
    /// The same size in bytes.
    pub fn bytes(self) -> u64 {
        u64::from(self.0) << 20
    }

    /// The smallest whole number of mebibytes that holds `bytes`; saturates.
    pub fn at_least(bytes: u64) -> MiB {
        MiB(u32::try_from(bytes.div_ceil(1 << 20)).unwrap_or(u32::MAX))
    }
}

impl std::fmt::Display for MiB {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} MiB", self.0)
    }
}

/// Virtual processors. The wire calls this `cpuCount`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Vcpus(pub u32);

impl std::fmt::Display for Vcpus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} vCPU", self.0)
    }
}
