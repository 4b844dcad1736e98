//! Where the machine monitor has the guest's memory: addresses of its process on one side, offsets of
//! the saved memory on the other.

use std::ops::Range;

use serde::Deserialize;

use crate::pages::PAGE_BYTES;

/// Regions at most. A microVM has one below the hole for devices and one above it; memory that may be
/// plugged in comes in one more each.
pub(super) const REGIONS_MAX: usize = 64;
/// Page size of a region on huge pages, in bytes: the one size that Firecracker offers.
pub(super) const HUGE_PAGE_BYTES: u64 = 2 << 20;
/// End of the addresses of a process. Source: x86-64 with four levels of page tables, and other
/// processors have no less.
const ADDRESS_END: u64 = 1 << 47;

/// A region as it is told: `page_size` by newer versions, `page_size_kib` by older ones, which fill in
/// bytes nevertheless, and neither by the oldest. What else is told is not needed.
#[derive(Debug, Deserialize)]
struct Told {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    page_size: Option<u64>,
    page_size_kib: Option<u64>,
}

/// What is wrong with the regions that a machine monitor tells.
#[derive(Debug, thiserror::Error)]
pub enum LayoutProblem {
    /// It is no list of regions.
    #[error("read the list of regions")]
    Json(#[source] serde_json::Error),
    /// None, or more than any machine has.
    #[error("take {0} regions: a machine has 1 to {REGIONS_MAX}")]
    Count(usize),
    /// A region is not what memory can be.
    #[error("take region {index} of {bytes} bytes at {address:#x}, offset {offset}: {problem}")]
    Region {
        /// Which, from 0, in the order they were told.
        index: usize,
        /// Its address in the monitor's process.
        address: u64,
        /// Its length.
        bytes: u64,
        /// Its place in the saved memory.
        offset: u64,
        /// What is wrong.
        problem: &'static str,
    },
}

/// A region of guest memory. All numbers are multiples of its page size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Region {
    address: u64,
    bytes: u64,
    offset: u64,
    page_bytes: u64,
}

/// Pages one after the other, within one region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Span {
    /// In the monitor's process.
    pub(super) address: u64,
    /// In the saved memory.
    pub(super) offset: u64,
    pub(super) bytes: u64,
    /// What memory is installed by: address, offset and bytes are multiples of it.
    pub(super) page_bytes: u64,
}

impl Span {
    /// The first `bytes` of it, a multiple of its page size, and the rest.
    pub(super) fn split(self, bytes: u64) -> (Span, Span) {
        let bytes = bytes.min(self.bytes);
        let (address, offset) = (self.address + bytes, self.offset + bytes);
        (Span { bytes, ..self }, Span { address, offset, bytes: self.bytes - bytes, ..self })
    }

    /// Its pages of 4 KiB in the saved memory.
    pub(super) fn pages(&self) -> Range<u64> {
        self.offset / PAGE_BYTES..(self.offset + self.bytes) / PAGE_BYTES
    }
}

impl Region {
    /// The span of `offsets`, which lie in the region, widened to whole pages.
    fn span(&self, offsets: Range<u64>) -> Span {
        let start = offsets.start - offsets.start % self.page_bytes;
        let end = offsets.end.next_multiple_of(self.page_bytes);
        Span {
            address: self.address + (start - self.offset),
            offset: start,
            bytes: end - start,
            page_bytes: self.page_bytes,
        }
    }

    fn offsets(&self) -> Range<u64> {
        self.offset..self.offset + self.bytes
    }
}

/// All regions of a machine. No two share an address or an offset.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Layout(Vec<Region>);

impl Layout {
    /// Reads what a monitor has told of a machine whose saved memory has `memory_bytes`. Every number is
    /// hostile.
    pub(super) fn parse(json: &[u8], memory_bytes: u64) -> Result<Layout, LayoutProblem> {
        let told: Vec<Told> = serde_json::from_slice(json).map_err(LayoutProblem::Json)?;
        if told.is_empty() || told.len() > REGIONS_MAX {
            return Err(LayoutProblem::Count(told.len()));
        }
        let mut regions: Vec<Region> = Vec::with_capacity(told.len());
        for (index, told) in told.iter().enumerate() {
            let region = region(told, memory_bytes, &regions);
            regions.push(region.map_err(|problem| LayoutProblem::Region {
                index,
                address: told.base_host_virt_addr,
                bytes: told.size,
                offset: told.offset,
                problem,
            })?);
        }
        Ok(Layout(regions))
    }

    /// The largest page of all regions, in bytes.
    pub(super) fn largest_page_bytes(&self) -> u64 {
        self.0.iter().map(|region| region.page_bytes).max().unwrap_or(PAGE_BYTES)
    }

    /// The page at `address` and the pages of its window: `window_bytes`, aligned in the saved memory and
    /// cut at the region's ends, and at least the page. `None` outside the guest's memory.
    pub(super) fn page_and_window(&self, address: u64, window_bytes: u64) -> Option<(Span, Span)> {
        let inside =
            |region: &&Region| (region.address..region.address + region.bytes).contains(&address);
        let region = self.0.iter().find(inside)?;
        let offset = region.offset + (address - region.address);
        let page = region.span(offset..offset + 1);
        let window = window_bytes.max(region.page_bytes);
        let start = (offset - offset % window).max(region.offset);
        let end = (offset - offset % window + window).min(region.offsets().end);
        Some((page, region.span(start..end)))
    }

    /// The spans of the saved memory's `offsets`.
    pub(super) fn spans_of(&self, offsets: Range<u64>) -> impl Iterator<Item = Span> {
        self.0.iter().filter_map(move |region| {
            let start = offsets.start.max(region.offset);
            let end = offsets.end.min(region.offsets().end);
            (start < end).then(|| region.span(start..end))
        })
    }

    /// The spans between two addresses, which are the kernel's and need not be the guest's memory.
    pub(super) fn spans_between(&self, start: u64, end: u64) -> impl Iterator<Item = Span> {
        self.0.iter().filter_map(move |region| {
            let from = start.max(region.address);
            let to = end.min(region.address + region.bytes);
            (from < to).then(|| {
                let first = region.offset + (from - region.address);
                region.span(first..first + (to - from))
            })
        })
    }
}

fn region(told: &Told, memory_bytes: u64, before: &[Region]) -> Result<Region, &'static str> {
    let Told { base_host_virt_addr: address, size: bytes, offset, .. } = *told;
    let page_bytes = page_bytes(told)?;
    if bytes == 0 {
        return Err("it is empty");
    }
    if [address, bytes, offset].iter().any(|number| !number.is_multiple_of(page_bytes)) {
        return Err("it does not consist of whole pages");
    }
    if address.checked_add(bytes).is_none_or(|end| end > ADDRESS_END) {
        return Err("no process has such addresses");
    }
    if offset.checked_add(bytes).is_none_or(|end| end > memory_bytes) {
        return Err("it goes beyond the saved memory");
    }
    let region = Region { address, bytes, offset, page_bytes };
    let overlap = |a: u64, b: u64, length: u64| a < b + length && b < a + bytes;
    if before.iter().any(|other| {
        overlap(address, other.address, other.bytes) || overlap(offset, other.offset, other.bytes)
    }) {
        return Err("it overlaps another");
    }
    Ok(region)
}

/// In bytes. The older name says KiB and holds bytes; a small number there can only be meant as named.
fn page_bytes(told: &Told) -> Result<u64, &'static str> {
    let bytes = match (told.page_size, told.page_size_kib) {
        (Some(bytes), _) => bytes,
        (None, Some(kib @ (4 | 2048))) => kib * 1024,
        (None, Some(bytes)) => bytes,
        (None, None) => PAGE_BYTES,
    };
    if bytes == PAGE_BYTES || bytes == HUGE_PAGE_BYTES {
        Ok(bytes)
    } else {
        Err("its pages have neither 4 KiB nor 2 MiB")
    }
}

#[cfg(test)]
#[path = "layout_tests.rs"]
mod tests;
