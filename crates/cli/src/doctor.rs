//! `belljar doctor`: what this machine has, what it lacks, and what to do about it.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::Result;
use belljar_domain::{MiB, Tier};
use belljar_runtime::firecracker::{DetectError as FirecrackerError, try_kvm};
use belljar_runtime::qemu::{DetectError, QemuConfig, QemuRuntime, TierReason};
use belljar_runtime::{FirecrackerRuntime, Runtime as _};
use serde::Serialize;

use crate::args::{Doctor, FirecrackerOptions};
use crate::host::firecracker_config;
use crate::output;
use crate::preset::Local;
use crate::server_file::Server;

/// Free space below which sandboxes soon fail: a template and a few written disks.
const DISK_FREE_MIN: MiB = MiB(4096);
/// The ports `belljar up` takes when it is told nothing.
const DEFAULT_PORTS: [u16; 2] = [3000, 3002];

/// Programs a node runs, the Debian package of each, and what for.
const PROGRAMS: [(&str, &str, &str); 4] = [
    ("qemu-system-x86_64", "qemu-system-x86", "runs the sandboxes' machines"),
    ("nft", "nftables", "keeps sandboxes from the host and from each other"),
    ("mke2fs", "e2fsprogs", "writes template disks"),
    ("mmdebstrap", "mmdebstrap", "assembles the base template from Debian packages"),
];

/// How a check went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    Ok,
    Warn,
    Fail,
    Fixed,
}

/// One check.
#[derive(Debug, Serialize)]
struct Check {
    name: String,
    status: Status,
    detail: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    fix: Option<String>,
}

impl Check {
    fn ok(name: &str, detail: impl Into<String>) -> Check {
        Check { name: name.to_owned(), status: Status::Ok, detail: detail.into(), fix: None }
    }

    fn fixed(name: &str, detail: impl Into<String>) -> Check {
        Check { status: Status::Fixed, ..Check::ok(name, detail) }
    }

    fn bad(name: &str, status: Status, detail: impl Into<String>, fix: impl Into<String>) -> Check {
        Check { name: name.to_owned(), status, detail: detail.into(), fix: Some(fix.into()) }
    }
}

pub(crate) async fn run(local: &Local, options: &Doctor, as_json: bool) -> Result<ExitCode> {
    let mut checks = vec![check_root(local)];
    checks.push(check_programs(local, options.fix));
    // Once: the driver times a small machine, which takes a second where KVM is of no use.
    let driver = QemuRuntime::detect(QemuConfig::default()).await;
    checks.push(check_isolation(&driver));
    checks.extend(check_firecracker(&options.firecracker).await);
    checks.push(check_tun());
    checks.push(check_forwarding(local, options.fix));
    checks.push(check_disk(&local.data_dir));
    checks.extend(DEFAULT_PORTS.map(|port| check_port(local, port)));
    checks.push(check_template(local, &driver));
    if as_json {
        output::json(&checks)?;
    } else {
        print(&checks)?;
    }
    let failed = checks.iter().any(|c| c.status == Status::Fail);
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn print(checks: &[Check]) -> Result<()> {
    for check in checks {
        let mark = match check.status {
            Status::Ok => "ok   ",
            Status::Warn => "warn ",
            Status::Fail => "FAIL ",
            Status::Fixed => "fixed",
        };
        output::line(&format!("{mark} {}: {}", check.name, check.detail))?;
        if let Some(fix) = &check.fix {
            output::line(&format!("      fix: {fix}"))?;
        }
    }
    Ok(())
}

fn check_root(local: &Local) -> Check {
    if local.is_root {
        return Check::ok("user", "root: namespaces, taps and machine users can be made");
    }
    Check::bad(
        "user",
        Status::Fail,
        "not root: network namespaces and taps cannot be made",
        "run `belljar up` as root (sudo); `--runtime fake` needs none but isolates nothing",
    )
}

fn on_path(program: &str) -> Option<PathBuf> {
    // Fixed folders instead of PATH: root's PATH often lacks sbin under sudo and cron.
    ["/usr/bin", "/usr/sbin", "/bin", "/sbin", "/usr/local/bin", "/usr/local/sbin"]
        .iter()
        .map(|dir| Path::new(dir).join(program))
        .find(|path| path.exists())
}

fn check_programs(local: &Local, fix: bool) -> Check {
    let missing = || PROGRAMS.iter().filter(|(program, _, _)| on_path(program).is_none());
    let packages: Vec<&str> = missing().map(|(_, package, _)| *package).collect();
    if packages.is_empty() {
        return Check::ok("programs", "QEMU, nft, mke2fs and mmdebstrap are there");
    }
    let why: Vec<String> =
        missing().map(|(program, _, what)| format!("{program} ({what})")).collect();
    let command = format!("apt-get install -y --no-install-recommends {}", packages.join(" "));
    if fix && local.is_root {
        // A fresh image has no package lists; if this fails, so does the install, which is told.
        let _refreshed = Command::new("apt-get")
            .args(["-q", "update"])
            .stdout(std::process::Stdio::null())
            .status();
        let installed = Command::new("apt-get")
            .args(["install", "-y", "--no-install-recommends"])
            .args(&packages)
            .env("DEBIAN_FRONTEND", "noninteractive")
            .stdout(std::process::Stdio::null())
            .status();
        if installed.is_ok_and(|status| status.success()) && missing().next().is_none() {
            return Check::fixed("programs", format!("installed {}", packages.join(", ")));
        }
    }
    Check::bad("programs", Status::Fail, format!("missing {}", why.join(", ")), command)
}

type Driver = Result<(QemuRuntime, TierReason), DetectError>;

fn check_isolation(driver: &Driver) -> Check {
    match driver {
        Ok((_, reason)) if reason.tier == Tier::Microvm => {
            Check::ok("isolation", format!("microvm: {}", reason.sentence))
        }
        Ok((_, reason)) => Check::bad(
            "isolation",
            Status::Warn,
            format!("{}: {}", reason.tier, reason.sentence),
            "full function, slow processor, no hardened boundary: run on a host whose KVM runs \
             guests (bare metal, or nested virtualisation switched on) for the microvm tier",
        ),
        Err(e) => Check::bad(
            "isolation",
            Status::Fail,
            format!("no machine can be started: {e}"),
            "install QEMU 10 or newer; Debian 12 has it in bookworm-backports: `cargo xtask setup` \
             adds that source and installs it",
        ),
    }
}

/// The releases that are named, if any is.
async fn check_firecracker(options: &FirecrackerOptions) -> Option<Check> {
    const NAME: &str = "firecracker";
    if options.programs.is_empty() {
        return None;
    }
    let found = match FirecrackerRuntime::detect(firecracker_config(options)).await {
        Ok(runtime) => try_kvm().await.map(|kvm| (runtime.versions().join(", "), kvm)),
        Err(e) => Err(e),
    };
    Some(match found {
        Ok((versions, kvm)) => Check::ok(NAME, format!("{versions}; {kvm}")),
        Err(e @ FirecrackerError::NoKvm { .. }) => Check::bad(
            NAME,
            Status::Fail,
            format!("failed to {e}"),
            "run on a host whose KVM runs guests; without one, leave --runtime firecracker away",
        ),
        Err(e) => Check::bad(
            NAME,
            Status::Fail,
            format!("failed to {e}"),
            "name stock releases, 1.10 or later, in --firecracker or BELLJAR_FIRECRACKER, as root",
        ),
    })
}

fn check_tun() -> Check {
    let device = Path::new("/dev/net/tun");
    match std::fs::OpenOptions::new().read(true).write(true).open(device) {
        Ok(_) => Check::ok("tap devices", "/dev/net/tun opens"),
        Err(e) => Check::bad(
            "tap devices",
            Status::Fail,
            format!("/dev/net/tun does not open: {e}"),
            "load the module (modprobe tun) and run as root",
        ),
    }
}

fn check_forwarding(local: &Local, fix: bool) -> Check {
    const SWITCH: &str = "/proc/sys/net/ipv4/ip_forward";
    let on = || std::fs::read_to_string(SWITCH).is_ok_and(|text| text.trim() == "1");
    if on() {
        return Check::ok("forwarding", "net.ipv4.ip_forward is 1");
    }
    if fix && local.is_root && std::fs::write(SWITCH, "1").is_ok() && on() {
        return Check::fixed("forwarding", "set net.ipv4.ip_forward to 1 until the next boot");
    }
    Check::bad(
        "forwarding",
        Status::Warn,
        "net.ipv4.ip_forward is 0: `belljar up` sets it to 1, so that sandboxes reach out",
        "sysctl -w net.ipv4.ip_forward=1",
    )
}

fn check_disk(dir: &Path) -> Check {
    match rustix::fs::statvfs(dir) {
        Ok(stat) => {
            let free =
                MiB(u32::try_from((stat.f_bavail * stat.f_frsize) >> 20).unwrap_or(u32::MAX));
            if free >= DISK_FREE_MIN {
                return Check::ok("disk", format!("{free} free under {}", dir.display()));
            }
            Check::bad(
                "disk",
                Status::Warn,
                format!("{free} free under {}, less than {DISK_FREE_MIN}", dir.display()),
                "free some space, or name a larger disk with --data-dir",
            )
        }
        Err(e) => Check::bad(
            "disk",
            Status::Fail,
            format!("{} cannot be measured: {e}", dir.display()),
            "name another folder with --data-dir",
        ),
    }
}

fn check_port(local: &Local, port: u16) -> Check {
    let name = format!("port {port}");
    if TcpListener::bind(("127.0.0.1", port)).is_ok() {
        return Check::ok(&name, "free");
    }
    let ours = Server::read(local).is_ok_and(|server| {
        let end = format!(":{port}");
        server.api_url.ends_with(&end) || server.sandbox_url.ends_with(&end)
    });
    if ours {
        return Check::ok(&name, "in use by this data folder's running server");
    }
    Check::bad(
        &name,
        Status::Warn,
        "in use by another program",
        "stop it, or start with --api-port and --proxy-port",
    )
}

/// Whether there is a template, and whether this host's driver can restore it.
fn check_template(local: &Local, driver: &Driver) -> Check {
    let fingerprint =
        driver.as_ref().map_or_else(|_| String::new(), |(qemu, _)| qemu.fingerprint());
    match belljar_sandbox::template::load_all(&local.templates_dir()) {
        Ok(templates) if templates.is_empty() => Check::bad(
            "template",
            Status::Warn,
            "no template is built, so no sandbox can be created",
            "in the source folder: `cargo xtask demo`; or `belljar template build --help`",
        ),
        Ok(templates) if templates.iter().all(|t| t.meta.fingerprint != fingerprint) => Check::bad(
            "template",
            Status::Warn,
            "every template was saved under another QEMU or tier and cannot be used",
            "build it again: `cargo xtask setup`, or `belljar template build --help`",
        ),
        Ok(templates) => {
            let names: Vec<String> =
                templates.iter().flat_map(|t| t.meta.aliases.iter().cloned()).collect();
            Check::ok("template", names.join(", "))
        }
        Err(e) => Check::bad(
            "template",
            Status::Fail,
            format!("the templates cannot be read: {e}"),
            "remove the named folder and build the template again",
        ),
    }
}
