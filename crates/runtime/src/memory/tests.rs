//! Maps and page maps as a kernel writes them, and the memory of a real process.

use super::*;

const FILE: MemoryFile = MemoryFile { inode: 77, bytes: 0x30_0000 };

fn entries(of: &[u64]) -> Vec<u8> {
    of.iter().flat_map(|entry| entry.to_ne_bytes()).collect()
}

#[test]
fn private_pages_are_the_present_and_swapped_ones_of_no_file() {
    let mine = PRESENT;
    let swapped = SWAPPED | 0x1234;
    let map = entries(&[0, mine, swapped, PRESENT | OF_FILE, mine, SWAPPED | OF_FILE, 0, mine]);
    assert_eq!(private_runs(&map, &|_| false).collect::<Vec<_>>(), [(1, 2), (4, 1), (7, 1)]);
    assert_eq!(private_runs(&entries(&[0, PRESENT | OF_FILE]), &|_| false).count(), 0);
    let also = |page| page == 3 || page == 6;
    let wanted = [(1, 4), (6, 2)];
    assert_eq!(private_runs(&map, &also).collect::<Vec<_>>(), wanted);
    let long = entries(&[mine; 600]);
    assert_eq!(
        private_runs(&long, &|_| false).collect::<Vec<_>>(),
        [(0, 256), (256, 256), (512, 88)]
    );
}

#[test]
fn the_memory_is_found_whole_and_in_order() {
    let maps = "\
        55d0-55d1 r--p 00000000 08:01 77                         /usr/bin/other\n\
        7f0000200000-7f0000300000 rw-p 00200000 08:02 77         /data/memory (deleted)\n\
        7f0000000000-7f0000200000 rw-p 00000000 08:02 77         /data/memory (deleted)\n\
        7f0000400000-7f0000500000 rw-s 00000000 08:03 77         /shared\n\
        7ffd00000000-7ffd00021000 rw-p 00000000 00:00 0          [stack]\n";
    let whole = [
        Piece { offset: 0, address: 0x7f00_0000_0000, bytes: 0x20_0000 },
        Piece { offset: 0x20_0000, address: 0x7f00_0020_0000, bytes: 0x10_0000 },
    ];
    assert_eq!(pieces(maps, FILE).expect("it is there"), whole);
    let cut = MemoryFile { bytes: 0x40_0000, ..FILE };
    for (maps, file) in [(maps, cut), ("", FILE), ("nonsense\n0-1 rwxp\n", FILE)] {
        let error = pieces(maps, file).expect_err("a part is missing");
        assert!(error.to_string().contains("in part, or not at all"), "{error}");
    }
    let twice = format!("{maps}7f1000000000-7f1000300000 rw-p 00000000 08:04 77 /data/memory\n");
    let error = pieces(&twice, FILE).expect_err("nobody knows which");
    assert!(error.to_string().contains("twice"), "{error}");
}
