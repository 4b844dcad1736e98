//! Fuzzing without a special compiler: seeds from `fuzz/corpus/TARGET`, mutated for a bounded time
//! by a generator that always does the same, in the ordinary tests. Targets stand beside the
//! parsers they are about.
//!
//! A check panics when a property does not hold, and returns a number that stands for what the
//! input led to. Inputs with a number not seen before are mutated further.

mod router;

use std::collections::HashSet;
use std::fmt::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long one target runs, milliseconds, unless `BELLJAR_FUZZ_MS` says otherwise.
const RUN_MS: u64 = 1000;

/// Longest input, bytes.
const INPUT_MAX_BYTES: usize = 8 * 1024;

/// Inputs that are kept to be mutated.
const POOL_MAX: usize = 2000;

/// Fewest inputs that count as a run; a slow machine gets more time to reach them.
const INPUTS_MIN: u64 = 200;

/// Runs `check` on the target's seeds, then on mutations of them. Words are put in now and then.
pub(crate) fn run(target: &str, words: &[&str], check: impl Fn(&[u8]) -> u64) {
    let (limit, seed) = (Duration::from_millis(number("BELLJAR_FUZZ_MS", RUN_MS)), seed(target));
    let mut random = Random(seed);
    let mut pool = seeds(target);
    let mut seen: HashSet<u64> = pool.iter().map(|input| guarded(target, input, &check)).collect();
    let started = Instant::now();
    let mut inputs = 0_u64;
    while started.elapsed() < limit || inputs < INPUTS_MIN {
        let mut input = random.pick(&pool).clone();
        for _ in 0..=random.below(4) {
            mutate(&mut input, &pool, words, &mut random);
        }
        input.truncate(INPUT_MAX_BYTES);
        inputs += 1;
        if seen.insert(guarded(target, &input, &check)) && pool.len() < POOL_MAX {
            pool.push(input);
        }
    }
    println!("{target}: {inputs} inputs, {} outcomes", seen.len());
}

/// One number for any value that can be hashed.
pub(crate) fn outcome(value: impl std::hash::Hash) -> u64 {
    use std::hash::{DefaultHasher, Hasher as _};
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

fn seeds(target: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let mut paths: Vec<PathBuf> = std::fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
        .map(|entry| entry.expect("readable").path())
        .collect();
    paths.sort();
    assert!(!paths.is_empty(), "{} has no seeds", folder.display());
    paths.iter().map(|path| std::fs::read(path).expect("readable")).collect()
}

/// Saves and prints the input of a check that panics.
fn guarded(target: &str, input: &[u8], check: &impl Fn(&[u8]) -> u64) -> u64 {
    catch_unwind(AssertUnwindSafe(|| check(input))).unwrap_or_else(|panic| {
        let mut name = format!("belljar-fuzz-{target}-");
        write!(name, "{:016x}", outcome(input)).expect("text takes it");
        let path = std::env::temp_dir().join(name);
        let saved = std::fs::write(&path, input);
        eprintln!("{target}: failed on \"{}\"", input.escape_ascii());
        eprintln!("saved as {} ({saved:?}); add it to fuzz/corpus/{target}", path.display());
        resume_unwind(panic)
    })
}

fn number(variable: &str, default: u64) -> u64 {
    #[expect(clippy::disallowed_methods, reason = "tests have no main that reads configuration")]
    let text = std::env::var(variable);
    text.ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// The same in every run, unless `BELLJAR_FUZZ_SEED` says otherwise.
fn seed(target: &str) -> u64 {
    let bytes = target.bytes().fold(0xCBF2_9CE4_8422_2325, |hash: u64, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3)
    });
    bytes ^ number("BELLJAR_FUZZ_SEED", 0)
}

/// SplitMix64.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    /// Any number.
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `limit`; 0 when that is 0.
    pub(crate) fn below(&mut self, limit: usize) -> usize {
        let limit = u64::try_from(limit).expect("64 bit").max(1);
        usize::try_from(self.next() % limit).expect("below a usize")
    }

    fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }
}

const BYTES: [u8; 16] = *b"\0\n\r /\\:;=%\"-.\xFF\x80\x7F";

const NUMBERS: [&str; 8] = [
    "0",
    "-1",
    "65536",
    "2147483648",
    "4294967295",
    "9223372036854775807",
    "18446744073709551615",
    "99999999999999999999999",
];

fn mutate(input: &mut Vec<u8>, pool: &[Vec<u8>], words: &[&str], random: &mut Random) {
    let at = random.below(input.len() + 1);
    let end = (at + random.below(32)).min(input.len());
    match random.below(10) {
        0 if at < input.len() => input[at] ^= 1 << random.below(8),
        1 if at < input.len() => input[at] = *random.pick(&BYTES),
        2 => input.insert(at, *random.pick(&BYTES)),
        3 => drop(input.drain(at..end)),
        4 => {
            let copy = input[at..end].repeat(1 + random.below(16));
            input.splice(at..at, copy);
        }
        5 => input.truncate(at),
        6 => {
            let other = random.pick(pool);
            let from = random.below(other.len() + 1);
            let tail = other[from..].to_vec();
            input.splice(at.., tail);
        }
        7 => drop(input.splice(at..end, random.pick(&NUMBERS).bytes())),
        _ if !words.is_empty() => drop(input.splice(at..at, random.pick(words).bytes())),
        _ => input.push(u8::try_from(random.below(256)).expect("a byte")),
    }
}
