use proptest::prelude::*;
use serde_json::json;

use super::*;

const MIB: u64 = 1 << 20;
const BASE: u64 = 0x7f00_0000_0000;

fn parse(text: &serde_json::Value) -> Result<Layout, LayoutProblem> {
    Layout::parse(text.to_string().as_bytes(), 8 * MIB)
}

/// What a region with one thing changed is refused for.
fn refusal(key: &str, value: impl Into<serde_json::Value>) -> String {
    let mut told = json!({"base_host_virt_addr": BASE, "size": 4 * MIB, "offset": 0});
    told[key] = value.into();
    parse(&json!([told])).expect_err("a bad region").to_string()
}

#[test]
fn every_generation_of_names_is_read() {
    let mut told = json!({"base_host_virt_addr": BASE, "size": 4 * MIB, "offset": 2 * MIB});
    let oldest = parse(&json!([told])).expect("no page size");
    assert_eq!(oldest.largest_page_bytes(), 4096);
    for (name, value, bytes) in [
        ("page_size_kib", 4096, 4096),
        ("page_size_kib", 2 << 20, 2 << 20),
        ("page_size_kib", 4, 4096),
        ("page_size_kib", 2048, 2 << 20),
        ("page_size", 4096, 4096),
        ("page_size", 2 << 20, 2 << 20),
    ] {
        let mut told = told.clone();
        told[name] = value.into();
        let layout = parse(&json!([told])).expect("a page size");
        assert_eq!(layout.largest_page_bytes(), bytes, "{name} {value}");
    }
    told["page_size"] = 4096.into();
    told["page_size_kib"] = 4096.into();
    told["something_new"] = json!({"a": [1]});
    assert_eq!(parse(&json!([told])).expect("both, and a new one"), oldest);
}

#[test]
fn bad_regions_are_refused_by_name() {
    for (key, value, says) in [
        ("size", 0, "it is empty"),
        ("size", 4097, "whole pages"),
        ("offset", 1, "whole pages"),
        ("base_host_virt_addr", BASE + 1, "whole pages"),
        ("base_host_virt_addr", u64::MAX - 4095, "no process has such addresses"),
        ("base_host_virt_addr", (1 << 47) - 4096, "no process has such addresses"),
        ("offset", 5 * MIB, "beyond the saved memory"),
        ("offset", u64::MAX - 4095, "beyond the saved memory"),
        ("page_size", 8192, "neither 4 KiB nor 2 MiB"),
        ("page_size", 0, "neither 4 KiB nor 2 MiB"),
    ] {
        let text = refusal(key, value);
        assert!(text.contains(says), "{key} {value}: {text}");
    }
    assert!(refusal("size", -1).contains("read the list of regions"));
    assert!(refusal("size", "big").contains("read the list of regions"));
}

#[test]
fn regions_do_not_overlap() {
    let region = |address: u64, offset: u64| json!({"base_host_virt_addr": address, "size": 2 * MIB, "offset": offset});
    parse(&json!([region(BASE, 0), region(BASE + 2 * MIB, 2 * MIB)])).expect("neighbours");
    parse(&json!([region(BASE + 2 * MIB, 0), region(BASE, 2 * MIB)])).expect("in any order");
    for (address, offset) in [(BASE + MIB, 4 * MIB), (BASE + 4 * MIB, MIB), (BASE, 0)] {
        let error = parse(&json!([region(BASE, 0), region(address, offset)])).expect_err("overlap");
        assert!(error.to_string().contains("overlaps another"), "{error}");
    }
}

#[test]
fn a_list_has_some_regions_and_not_many() {
    assert!(matches!(parse(&json!([])), Err(LayoutProblem::Count(0))));
    let region = |index: u64| {
        let at = index * 4096;
        json!({"base_host_virt_addr": BASE + at, "size": 4096, "offset": at})
    };
    let all = |count: u64| (0..count).map(region).collect::<serde_json::Value>();
    parse(&all(64)).expect("64 regions");
    assert!(matches!(parse(&all(65)), Err(LayoutProblem::Count(65))));
}

#[test]
fn windows_are_aligned_in_the_memory_and_cut_at_the_region() {
    let layout = parse(&json!([
        {"base_host_virt_addr": BASE, "size": 3 * 4096, "offset": 0},
        {"base_host_virt_addr": BASE + MIB, "size": MIB, "offset": 3 * 4096},
    ]));
    let layout = layout.expect("two regions");
    let (page, window) = layout.page_and_window(BASE + 4096 + 77, 65536).expect("inside");
    assert_eq!((page.address, page.offset, page.bytes), (BASE + 4096, 4096, 4096));
    assert_eq!((window.address, window.offset, window.bytes), (BASE, 0, 3 * 4096));
    let (page, window) = layout.page_and_window(BASE + MIB, 65536).expect("inside");
    assert_eq!((page.offset, window.offset, window.bytes), (3 * 4096, 3 * 4096, 13 * 4096));
    assert_eq!(layout.page_and_window(BASE + 3 * 4096, 65536), None);
    let spans: Vec<_> = layout.spans_of(2 * 4096..5 * 4096).collect();
    assert_eq!(spans.len(), 2);
    assert_eq!((spans[1].address, spans[1].pages()), (BASE + MIB, 3..5));
    let removed: Vec<_> = layout.spans_between(0, BASE + MIB + 4096).collect();
    assert_eq!(removed.iter().map(Span::pages).collect::<Vec<_>>(), [0..3, 3..4]);
}

proptest! {
    /// Whatever is told, an accepted layout has every page inside the memory, and none twice.
    #[test]
    fn what_is_accepted_lies_inside(
        regions in prop::collection::vec(
            (0_u64..12, 0_u64..12, 0_u64..12, prop::option::of(prop::sample::select(
                vec![0_u64, 4, 2048, 4096, 1 << 21, u64::MAX]))), 0..5),
        shift in prop::sample::select(vec![0_u64, 1, 1 << 46, u64::MAX - (6 << 20)]),
    ) {
        let half = 512_u64 << 10;
        let told: serde_json::Value = regions.iter().map(|(address, size, offset, page)| json!({
            "base_host_virt_addr": (address * half).wrapping_add(shift),
            "size": size * half, "offset": offset * half, "page_size_kib": page,
        })).collect();
        if let Ok(layout) = Layout::parse(told.to_string().as_bytes(), 4 * MIB) {
            let mut seen = vec![false; 1024];
            for span in layout.spans_of(0..4 * MIB) {
                for page in span.pages() {
                    let page = usize::try_from(page).expect("small");
                    prop_assert!(!std::mem::replace(&mut seen[page], true));
                }
                let (page, window) = layout.page_and_window(span.address, 65536).expect("inside");
                prop_assert_eq!(page.offset, span.offset);
                prop_assert!(window.offset <= page.offset);
                prop_assert!(window.offset + window.bytes <= 4 * MIB);
            }
        }
    }

    #[test]
    fn no_bytes_do_harm(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _refused_or_not = Layout::parse(&bytes, 4 * MIB);
    }
}
