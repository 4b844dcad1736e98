//! The guest daemon as it is shipped: one static file that needs nothing of the root file system
//! it runs in.
//!
//! The binary is the one among the assets, which setup puts there and `BELLJAR_ASSETS` names.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use belljar_testkit::{assets, is_root, skip};

/// Source: the project's own promise.
const SIZE_MAX_BYTES: usize = 5 * 1024 * 1024;

const SOON: Duration = Duration::from_secs(20);

/// What the C library's name services leave in a static program, also in a stripped one: the file
/// that names the modules, the module names, and the source file that loads them.
const NAME_SERVICE_MARKS: [&str; 3] = ["/etc/nsswitch.conf", "libnss_", "nss_module.c"];

/// The calls that bring them in; a program that keeps its symbols must have none of these.
const NAME_SERVICE_SYMBOLS: [&str; 14] = [
    "getaddrinfo",
    "gethostbyname",
    "gethostbyname_r",
    "gethostbyaddr_r",
    "getnameinfo",
    "getpwnam_r",
    "getpwuid_r",
    "getgrnam_r",
    "getgrgid_r",
    "getgrouplist",
    "initgroups",
    "getservbyname_r",
    "__nss_lookup",
    "__nss_module_load",
];

/// One program for each family of calls: each must be found out, or the search finds nothing.
const CONTROLS: [&str; 3] = [
    "#include <netdb.h>\nint main(int c, char **v) { struct addrinfo *r; \
     return getaddrinfo(v[0], \"80\", 0, &r); }",
    "#include <pwd.h>\nint main(int c, char **v) { return getpwnam(v[0]) != 0; }",
    "#include <grp.h>\nint main(int c, char **v) { return getgrgid(c) != 0; }",
];

fn guest_binary() -> Option<PathBuf> {
    let assets = assets();
    if assets.is_none() {
        skip("BELLJAR_ASSETS names no guest daemon; `cargo xtask setup` builds it");
    }
    assets.map(|assets| assets.envd)
}

fn contains(program: &[u8], text: &str) -> bool {
    program.windows(text.len()).any(|window| window == text.as_bytes())
}

/// The fields of an ELF file that are asked for. Source: `elf(5)`, 64 bit, little endian.
struct Elf<'a>(&'a [u8]);

impl Elf<'_> {
    fn number(&self, at: usize, bytes: usize) -> usize {
        let field = self.0.get(at..at + bytes).expect("inside the file");
        field.iter().rev().fold(0, |number, byte| number << 8 | usize::from(*byte))
    }

    fn segment_kinds(&self) -> Vec<usize> {
        assert_eq!(self.0.get(..6), Some(&b"\x7fELF\x02\x01"[..]), "64 bit, little endian");
        let (table, size, count) = (self.number(32, 8), self.number(54, 2), self.number(56, 2));
        (0..count).map(|index| self.number(table + index * size, 4)).collect()
    }

    /// Names in the symbol table; none in a stripped program.
    fn symbols(&self) -> Vec<String> {
        let (table, size, count) = (self.number(40, 8), self.number(58, 2), self.number(60, 2));
        let section = |index: usize| table + index * size;
        const SYMBOL_TABLE: usize = 2;
        let found = (0..count).find(|index| self.number(section(*index) + 4, 4) == SYMBOL_TABLE);
        let Some(symbols) = found.map(section) else { return Vec::new() };
        let names = self.number(section(self.number(symbols + 40, 4)) + 24, 8);
        let (start, length) = (self.number(symbols + 24, 8), self.number(symbols + 32, 8));
        let name = |symbol: usize| {
            let from = names + self.number(symbol, 4);
            let bytes = self.0[from..].iter().take_while(|byte| **byte != 0).copied().collect();
            String::from_utf8(bytes).expect("names are text")
        };
        (start..start + length).step_by(24).map(name).collect()
    }

    fn name_services(&self) -> Vec<String> {
        let marks = NAME_SERVICE_MARKS.iter().filter(|mark| contains(self.0, mark));
        let marks = marks.map(|mark| (*mark).to_owned());
        let symbols = self.symbols().into_iter();
        marks.chain(symbols.filter(|name| NAME_SERVICE_SYMBOLS.contains(&name.as_str()))).collect()
    }
}

const PT_INTERP: usize = 3;

#[test]
fn the_binary_is_static_and_small() {
    let Some(path) = guest_binary() else { return };
    let program = std::fs::read(path).expect("readable");
    assert!(!Elf(&program).segment_kinds().contains(&PT_INTERP), "it wants a dynamic linker");
    assert!(program.len() < SIZE_MAX_BYTES, "it has {} bytes", program.len());
    let own = std::fs::read("/proc/self/exe").expect("readable");
    assert!(Elf(&own).segment_kinds().contains(&PT_INTERP), "this test is a dynamic program");
}

#[test]
fn the_binary_has_no_name_services() {
    let Some(path) = guest_binary() else { return };
    let program = std::fs::read(path).expect("readable");
    assert_eq!(Elf(&program).name_services(), Vec::<String>::new());
}

#[test]
fn name_services_are_found_where_they_are() {
    let folder = tempfile::tempdir().expect("a directory");
    for (index, source) in CONTROLS.iter().enumerate() {
        let (code, program) = (folder.path().join("a.c"), folder.path().join("a"));
        std::fs::write(&code, source).expect("written");
        for stripped in [true, false] {
            let mut compiler = Command::new("cc");
            compiler.args(["-static", "-Wl,--gc-sections"]).args(stripped.then_some("-s"));
            let outcome = compiler.arg("-o").arg(&program).arg(&code).output();
            if !outcome.is_ok_and(|output| output.status.success()) {
                return skip("no C compiler with a static C library is here");
            }
            let program = std::fs::read(&program).expect("readable");
            let found = Elf(&program).name_services();
            let in_symbols = found.iter().any(|name| NAME_SERVICE_SYMBOLS.contains(&name.as_str()));
            assert!(found.len() >= NAME_SERVICE_MARKS.len(), "control {index}: {found:?}");
            assert_eq!(in_symbols, !stripped, "control {index}: {found:?}");
        }
    }
}

/// A daemon whose root file system holds nothing but itself.
struct Bare {
    daemon: Child,
    address: String,
    _root: tempfile::TempDir,
}

impl Bare {
    fn start(binary: &Path) -> Bare {
        let root = tempfile::tempdir().expect("a directory");
        std::fs::copy(binary, root.path().join("envd")).expect("copied");
        let mut daemon = Command::new("chroot")
            .arg(root.path())
            .args(["/envd", "--host-mode", "--listen", "127.0.0.1:0", "--root-user", "root"])
            .stderr(Stdio::piped())
            .spawn()
            .expect("chroot is there");
        let stderr = BufReader::new(daemon.stderr.take().expect("piped"));
        let (sender, lines) = mpsc::sync_channel(16);
        std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                // Nobody reads on behind the address.
                let _ = sender.try_send(line);
            }
        });
        let line = lines.recv_timeout(SOON).expect("it says that it serves");
        let address = line.split_whitespace().find_map(|word| word.strip_prefix("address="));
        let address = address.unwrap_or_else(|| panic!("no address in {line:?}")).to_owned();
        Bare { daemon, address, _root: root }
    }

    /// One request; gives back all of the answer.
    fn ask(&self, head: &str, body: &[u8]) -> String {
        let mut stream = TcpStream::connect(&self.address).expect("it listens");
        stream.set_read_timeout(Some(SOON)).expect("set");
        let length = body.len();
        write!(stream, "{head}Host: x\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n")
            .and_then(|()| stream.write_all(body))
            .expect("sent");
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).expect("a whole answer in time");
        String::from_utf8_lossy(&answer).into_owned()
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        // It may have ended by itself, which the test has found out by other means.
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

#[test]
fn it_serves_in_an_empty_root() {
    let Some(binary) = guest_binary() else { return };
    if !is_root() {
        return skip("chroot needs root");
    }
    let bare = Bare::start(&binary);
    let health = bare.ask("GET /health HTTP/1.1\r\n", b"");
    assert!(health.starts_with("HTTP/1.1 204"), "{health}");
    let metrics = bare.ask("GET /metrics HTTP/1.1\r\n", b"");
    assert!(metrics.contains("\"mem_total\":0"), "there is no /proc to read: {metrics}");
    let json = "Content-Type: application/json\r\n";
    let list = format!("POST /filesystem.Filesystem/ListDir HTTP/1.1\r\n{json}");
    let list = bare.ask(&list, br#"{"path":"/","depth":1}"#);
    assert!(list.contains("\"/envd\""), "{list}");
    // No home is there, no program, and no null device for it to read.
    for (cwd, named) in [("", "cwd '/root' does not exist"), ("/", "failed to start '/bin/sh'")] {
        let start = format!(r#"{{"process":{{"cmd":"/bin/sh","cwd":"{cwd}"}},"stdin":false}}"#);
        let length = u32::try_from(start.len()).expect("short");
        let body = [&[0][..], &length.to_be_bytes(), start.as_bytes()].concat();
        let kind = "Content-Type: application/connect+json\r\nConnect-Protocol-Version: 1\r\n";
        let start = bare.ask(&format!("POST /process.Process/Start HTTP/1.1\r\n{kind}"), &body);
        assert!(start.contains("\"error\"") && start.contains(named), "{start}");
    }
    let health = bare.ask("GET /health HTTP/1.1\r\n", b"");
    assert!(health.starts_with("HTTP/1.1 204"), "afterwards: {health}");
}
