//! The outer machine's process: how it is started, and what it is asked to do.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::io::FdFlags;

use super::monitor::{Monitor, read_line};
use crate::command;
use crate::setup::OuterParts;

/// Debian's name for it; the driver under test uses the same.
pub(super) const PROGRAM: &str = "qemu-system-x86_64";
/// Two machines of 512 MiB, what changes in files, and the system; only what is used is taken.
const MEMORY_MIB: u32 = 3072;
/// A restored machine's guests have two processors, and two of them run at a time.
const PROCESSORS: u32 = 2;
/// Translated code: three layers of programs run in this machine.
const TRANSLATION_CACHE_MIB: u32 = 512;
/// From exec to `ready`, booted: 10 s measured alone, minutes where twenty others compile.
pub(super) const BOOT_LIMIT: Duration = Duration::from_secs(5 * 60);
/// Lines of a log that an error shows.
const TAIL_LINES: usize = 12;

/// One machine to start.
pub(super) struct Plan<'a> {
    pub(super) parts: &'a OuterParts,
    /// Its memory: a new file for a boot, the saved one for a copy.
    pub(super) memory: &'a Path,
    pub(super) tsc_khz: u64,
    pub(super) origin: Origin<'a>,
}

/// How the machine comes to life.
pub(super) enum Origin<'a> {
    /// From its kernel.
    Boot,
    /// From a saved state; it changes neither that nor the memory file.
    Saved { state: &'a Path },
}

/// The arguments that make the machine what it is: a saved one needs the same.
pub(super) fn shape() -> Vec<String> {
    let words = [
        "-nodefaults -no-user-config -no-reboot -display none",
        // Debian's kernel finds its devices by PCI only.
        "-machine q35,memory-backend=ram",
        &format!("-accel tcg,thread=multi,tb-size={TRANSLATION_CACHE_MIB}"),
        "-cpu max,+svm",
        &format!("-smp {PROCESSORS} -m {MEMORY_MIB}M"),
        "-device isa-serial,chardev=console -device virtio-serial-pci",
        "-device virtserialport,chardev=control,nr=1,name=control",
        "-device virtserialport,chardev=out,nr=2,name=out",
        "-device virtserialport,chardev=err,nr=3,name=err",
        "-device virtio-rng-pci",
        // Everything of this host, for reading: some folders are mounts of their own.
        "-fsdev local,id=host,path=/,security_model=none,readonly=on,multidevs=remap",
        "-device virtio-9p-pci,fsdev=host,mount_tag=host",
    ];
    words.iter().flat_map(|line| line.split(' ')).map(str::to_owned).collect()
}

/// The kernel's words. Nothing in there is hostile, so no time is spent on mitigations.
fn kernel_words(tsc_khz: u64) -> String {
    format!(
        "quiet panic=-1 reboot=t console=ttyS0 mitigations=off tsc_early_khz={tsc_khz} tsc=reliable"
    )
}

/// A value in an option of the form `name=value,…`, where two commas are one.
fn value(path: &Path) -> OsString {
    let mut bytes = Vec::new();
    for byte in path.as_os_str().as_bytes() {
        bytes.push(*byte);
        if *byte == b',' {
            bytes.push(b',');
        }
    }
    std::os::unix::ffi::OsStringExt::from_vec(bytes)
}

impl Plan<'_> {
    /// The command line but for its channels.
    fn command(&self, console_log: &Path) -> Command {
        let mut command = command::tied(PROGRAM);
        command.args(shape());
        let with_path = |start: &str, path: &Path| {
            let mut option = OsString::from(start);
            option.push(value(path));
            option
        };
        command.arg("-chardev").arg(with_path("file,id=console,path=", console_log));
        command.args(["-mon", "chardev=monitor,mode=control"]);
        let sharing = match self.origin {
            Origin::Boot => "share=on",
            // A private copy of each page it writes, over a file it cannot write.
            Origin::Saved { .. } => "share=off,readonly=on,rom=off",
        };
        let memory = format!("memory-backend-file,id=ram,size={MEMORY_MIB}M,{sharing},mem-path=");
        command.arg("-object").arg(with_path(&memory, self.memory));
        // A copy is not booted, but has all that the saved one had.
        command.arg("-kernel").arg(self.parts.kernel()).arg("-initrd").arg(self.parts.initrd());
        command.arg("-append").arg(kernel_words(self.tsc_khz));
        if let Origin::Saved { .. } = self.origin {
            command.args(["-incoming", "defer"]);
        }
        command
    }
}

/// A running outer machine. Its process ends with this value, and with the thread that made it.
pub(super) struct Outer {
    child: Process,
    control: BufReader<UnixStream>,
    out: UnixStream,
    err: UnixStream,
    monitor: Monitor,
    logs: [PathBuf; 2],
}

impl Outer {
    /// Starts the process; its logs go to `folder`.
    pub(super) fn start(plan: &Plan<'_>, folder: &Path) -> Result<Outer> {
        let logs = ["qemu.log", "console.log"].map(|name| folder.join(name));
        let mut command = plan.command(&logs[1]);
        let mut inherited: Vec<OwnedFd> = Vec::new();
        let mut channel = |id: &str| -> Result<UnixStream> {
            let (ours, theirs) = UnixStream::pair()?;
            // It is to outlive the exec, under its number.
            rustix::io::fcntl_setfd(&theirs, FdFlags::empty())?;
            command.arg("-chardev").arg(format!("socket,id={id},fd={}", theirs.as_raw_fd()));
            inherited.push(theirs.into());
            Ok(ours)
        };
        let (control, out, err) = (channel("control")?, channel("out")?, channel("err")?);
        let monitor = channel("monitor")?;
        let log = File::create(&logs[0])
            .with_context(|| format!("cannot write {}", logs[0].display()))?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let child = command.spawn().with_context(|| format!("cannot start {PROGRAM}"))?;
        drop(inherited);
        let child = Process(child);
        let mut monitor = Monitor::greet(monitor).with_context(|| tails(&logs))?;
        if let Origin::Saved { state } = plan.origin {
            monitor.load(&text(state)?).with_context(|| tails(&logs))?;
        }
        Ok(Outer { child, control: BufReader::new(control), out, err, monitor, logs })
    }

    /// Waits until the machine has booted and stands before its request.
    pub(super) fn ready(&mut self) -> Result<()> {
        let line = self.answer(Instant::now() + BOOT_LIMIT).context("the outer machine's boot")?;
        if line != "ready" {
            bail!("the outer machine said `{line}` instead of `ready`; {}", tails(&self.logs));
        }
        Ok(())
    }

    /// Saves the machine to `state`, beside its memory file, and ends it.
    pub(super) fn save(mut self, state: &Path) -> Result<()> {
        self.monitor.save(&text(state)?)?;
        self.monitor.quit()?;
        self.child.0.wait()?;
        Ok(())
    }

    /// Has `script` run, hands over what it prints, and gives back its exit code.
    ///
    /// # Errors
    /// It did not end within `limit`, or the machine failed. Either way the machine is gone.
    pub(super) fn run(
        mut self,
        script: &Path,
        limit: Duration,
        out: &mut (dyn Write + Send),
        err: &mut (dyn Write + Send),
    ) -> Result<u8> {
        let deadline = Instant::now() + limit;
        let (from_out, from_err) = (self.out.try_clone()?, self.err.try_clone()?);
        std::thread::scope(|scope| {
            scope.spawn(move || carry(from_out, out));
            scope.spawn(move || carry(from_err, err));
            let code = self.request(script, deadline, limit);
            // The machine's end is the end of what the two threads read.
            drop(self);
            code
        })
    }

    fn request(&mut self, script: &Path, deadline: Instant, limit: Duration) -> Result<u8> {
        let line = format!("run {}\n", text(script)?);
        self.control.get_ref().write_all(line.as_bytes()).with_context(|| tails(&self.logs))?;
        let answer = match self.answer(deadline) {
            Ok(answer) => answer,
            Err(_) if Instant::now() >= deadline => bail!(
                "the command did not end within {} s and was ended with its machine; --timeout \
                 gives it longer",
                limit.as_secs()
            ),
            Err(error) => return Err(error),
        };
        match answer.split_once(' ') {
            Some(("exit", code)) => {
                code.parse().with_context(|| format!("the outer machine said exit code `{code}`"))
            }
            Some(("fault", reason)) => bail!("the outer machine: {reason}; {}", tails(&self.logs)),
            _ => bail!("the outer machine said `{answer}`"),
        }
    }

    fn answer(&mut self, deadline: Instant) -> Result<String> {
        match read_line(&mut self.control, deadline)? {
            Some(line) => Ok(line.trim_end().to_owned()),
            None => bail!("the outer machine is gone; {}", tails(&self.logs)),
        }
    }
}

/// A process that ends with this value.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // One that has ended by itself cannot be killed, which is fine.
        let _ = self.0.kill();
        if let Err(error) = self.0.wait() {
            eprintln!("warning: the outer machine's process stays: {error}");
        }
    }
}

/// Copies until the end. A reader that went away must not stop the program that writes.
fn carry(mut from: UnixStream, to: &mut dyn Write) {
    let mut block = [0; 1 << 16];
    loop {
        match from.read(&mut block) {
            Ok(0) => return,
            Ok(length) => {
                let _ = to.write_all(&block[..length]).and_then(|()| to.flush());
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

/// A path for a line of text.
fn text(path: &Path) -> Result<String> {
    match path.to_str() {
        Some(text) if !text.contains(['\n', ' ']) => Ok(text.to_owned()),
        _ => bail!(
            "{} cannot be named to the outer machine: set BELLJAR_CACHE_DIR to a path without spaces",
            path.display()
        ),
    }
}

fn tails(logs: &[PathBuf]) -> String {
    let lines: Vec<String> = logs.iter().flat_map(|log| command::tail(log, TAIL_LINES)).collect();
    if lines.is_empty() { "its logs are empty".to_owned() } else { lines.join(" | ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commas_in_paths_do_not_end_a_value() {
        assert_eq!(value(Path::new("/a,b")), "/a,,b");
    }

    #[test]
    fn paths_are_one_word_of_a_line() {
        assert_eq!(text(Path::new("/a/b")).unwrap(), "/a/b");
        for bad in ["/a b", "/a\nb"] {
            assert!(text(Path::new(bad)).unwrap_err().to_string().contains("BELLJAR_CACHE_DIR"));
        }
    }

    #[test]
    fn the_kernel_is_told_the_counter() {
        assert!(kernel_words(2_445_430).contains("tsc_early_khz=2445430 "));
        assert!(shape().windows(2).any(|pair| pair == ["-cpu", "max,+svm"]));
    }
}
