//! Which part of a file a request asks for.

/// What to send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Selection {
    /// Everything.
    Whole,
    /// Bytes `start` up to but not including `end`.
    Part {
        /// First byte.
        start: u64,
        /// One behind the last.
        end: u64,
    },
    /// The file has none of the bytes asked for.
    None,
}

/// Reads a `Range` header for a file of `size` bytes. One range is honoured; several, or one that
/// does not parse, are ignored, as RFC 9110 section 14.2 permits.
pub(super) fn select(header: Option<&str>, size: u64) -> Selection {
    let Some(spec) = header.and_then(|text| text.trim().strip_prefix("bytes=")) else {
        return Selection::Whole;
    };
    let Some((first, last)) = spec.split_once('-') else { return Selection::Whole };
    let (first, last) = (first.trim(), last.trim());
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if !digits(first) || !digits(last) {
        return Selection::Whole;
    }
    // Numbers that do not fit lie behind every file.
    let number = |text: &str| text.parse::<u64>().unwrap_or(u64::MAX);
    let (start, end) = match (first.is_empty(), last.is_empty()) {
        (true, true) => return Selection::Whole,
        (true, false) => (size.saturating_sub(number(last)), size),
        (false, true) => (number(first), size),
        (false, false) => {
            if number(last) < number(first) {
                return Selection::Whole;
            }
            (number(first), number(last).saturating_add(1).min(size))
        }
    };
    if start >= end { Selection::None } else { Selection::Part { start, end } }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_select_what_rfc_9110_says() {
        let part = |start, end| Selection::Part { start, end };
        for (header, expected) in [
            ("bytes=0-3", part(0, 4)),
            ("bytes=4-", part(4, 10)),
            ("bytes=-3", part(7, 10)),
            ("bytes=-99", part(0, 10)),
            ("bytes=8-99", part(8, 10)),
            ("bytes=9-9", part(9, 10)),
            ("bytes=10-", Selection::None),
            ("bytes=-0", Selection::None),
            ("bytes=99999999999999999999-", Selection::None),
            ("bytes=3-1", Selection::Whole),
            ("bytes=0-1,4-5", Selection::Whole),
            ("bytes=a-b", Selection::Whole),
            ("bytes=-", Selection::Whole),
            ("lines=0-1", Selection::Whole),
        ] {
            assert_eq!(select(Some(header), 10), expected, "{header}");
        }
        assert_eq!(select(None, 10), Selection::Whole);
        assert_eq!(select(Some("bytes=0-"), 0), Selection::None);
    }

    #[test]
    fn any_range_lies_within_the_file() {
        crate::fuzz::run("ranges", &["bytes=", "-", ","], |input| {
            let header = String::from_utf8_lossy(input);
            let mut outcomes = Vec::new();
            for size in [0, 1, 10, u64::MAX] {
                let selected = select(Some(&header), size);
                if let Selection::Part { start, end } = selected {
                    assert!(start < end && end <= size);
                }
                outcomes.push(std::mem::discriminant(&selected));
            }
            crate::fuzz::outcome(outcomes)
        });
    }
}
