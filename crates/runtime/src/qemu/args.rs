//! The machine monitor's command line. Pure: text in, text out.

use std::os::fd::RawFd;

use belljar_domain::{MiB, Vcpus};
use belljar_wire::guest::PORT_NAME;
use serde_json::json;

use crate::saved::StateKind;

/// Generation of the machine this file describes. A saved machine restores only into the same
/// devices in the same order, and keeps what its kernel decided by the words it was booted with: any
/// change of either gets a new number.
///
/// 2: `tsc=reliable`.
pub(super) const LAYOUT: u32 = 2;

/// x86-64-v2 without AVX. Plain `qemu64` lacks what today's distributions assume; `max` adds AVX,
/// which is emulated at half the speed (hashing) and slows every boot. `rdrand` lets the guest
/// kernel seed its random pool before its first process.
pub(super) const EMULATED_CPU: &str = "qemu64,+ssse3,+sse4.1,+sse4.2,+popcnt,+rdrand";

/// Bound of the translated-code cache. Without it QEMU takes up to a gibibyte a machine.
pub(super) const TRANSLATION_CACHE_MIB: u32 = 128;

/// How this host runs guests' instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Accelerator {
    Kvm,
    Emulated {
        /// Frequency of the time stamp counter. The guest cannot measure it: the machine has
        /// no timer to measure against, and a wrong guess is a wrong clock.
        tsc_khz: u64,
    },
}

/// The same for one machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Execution {
    Kvm {
        /// `/dev/kvm`, opened by us: the machine's own user may not.
        device: RawFd,
    },
    Emulated {
        tsc_khz: u64,
    },
}

/// The set of descriptors that `/dev/kvm` is in. The name `/dev/fdset/1` is the monitor's own, and
/// means the descriptor itself, where `/proc/self/fd` would open the device again.
const KVM_SET: u32 = 1;

/// How the machine comes to life.
#[derive(Debug, Clone)]
pub(super) enum Origin {
    Boot {
        kernel: String,
        cmdline: Vec<String>,
    },
    /// Waits for a saved state to be named over QMP.
    Saved(StateKind),
}

/// How the machine has its memory file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mapping {
    /// Writes go to the file.
    Shared,
    /// A private copy of every page it writes, over a file it cannot write.
    Private,
}

/// Where the root disk's blocks are.
#[derive(Debug, Clone)]
pub(super) enum Disk {
    NbdSocket(String),
    RawFile(String),
}

/// The network card.
#[derive(Debug, Clone, Copy)]
pub(super) struct Card {
    pub(super) tap: RawFd,
    pub(super) mac: [u8; 6],
}

/// Everything the command line says.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    pub(super) name: String,
    pub(super) execution: Execution,
    pub(super) vcpus: Vcpus,
    pub(super) memory: MiB,
    pub(super) memory_file: String,
    pub(super) mapping: Mapping,
    pub(super) origin: Origin,
    pub(super) disk: Disk,
    pub(super) card: Option<Card>,
    pub(super) monitor: RawFd,
    pub(super) control: RawFd,
    /// File for the guest's console; `None` discards it, because a guest could fill the disk.
    pub(super) console: Option<String>,
}

/// The two arguments that mark the process of machine `name`.
pub(super) fn marker(name: &str) -> [String; 2] {
    ["-name".to_owned(), format!("belljar-{name},debug-threads=off")]
}

impl Plan {
    /// The arguments, without the program.
    pub(super) fn arguments(&self) -> Vec<String> {
        let mut args: Vec<String> = Vec::with_capacity(64);
        args.extend(marker(&self.name));
        args.extend(["-nodefaults", "-no-user-config", "-no-reboot"].map(String::from));
        let mut option = |name: &str, value: String| args.extend([name.to_owned(), value]);
        option("-display", "none".into());
        option(
            "-sandbox",
            "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny".into(),
        );
        // No ACPI: under emulation its timers keep the kernel from starting at all.
        option(
            "-machine",
            "microvm,acpi=off,isa-serial=off,rtc=on,auto-kernel-cmdline=on,\
             x-option-roms=off,memory-backend=ram"
                .into(),
        );
        option("-global", "virtio-mmio.force-legacy=false".into());
        match self.execution {
            Execution::Kvm { device } => {
                option("-add-fd", format!("fd={device},set={KVM_SET}"));
                option("-accel", format!("kvm,device=/dev/fdset/{KVM_SET}"));
                option("-cpu", "host".into());
            }
            Execution::Emulated { .. } => {
                option("-accel", format!("tcg,tb-size={TRANSLATION_CACHE_MIB}"));
                option("-cpu", EMULATED_CPU.into());
            }
        }
        option("-smp", self.vcpus.0.to_string());
        option("-m", format!("{}M", self.memory.0));
        option("-object", self.memory_backend());
        match &self.origin {
            Origin::Boot { kernel, cmdline } => {
                option("-kernel", kernel.clone());
                option("-append", self.kernel_words(cmdline).join(" "));
            }
            Origin::Saved(kind) => {
                if *kind == StateKind::Devices {
                    // Such a state does not begin with a word about the configuration.
                    option("-global", "migration.send-configuration=off".into());
                }
                option("-incoming", "defer".into());
            }
        }
        self.devices(&mut option);
        args
    }

    fn memory_backend(&self) -> String {
        let mut backend = json!({
            "qom-type": "memory-backend-file",
            "id": "ram",
            "size": self.memory.bytes(),
            "mem-path": self.memory_file,
        });
        match self.mapping {
            Mapping::Shared => backend["share"] = true.into(),
            Mapping::Private => {
                backend["share"] = false.into();
                backend["readonly"] = true.into();
                backend["rom"] = "off".into();
            }
        }
        backend.to_string()
    }

    fn kernel_words(&self, extra: &[String]) -> Vec<String> {
        let mut words: Vec<String> = ["panic=-1", "reboot=t", "console=hvc0", "root=/dev/vda"]
            .into_iter()
            .chain(["rootfstype=ext4", "rw", "init=/usr/sbin/belljar-envd"])
            .map(String::from)
            .collect();
        if self.console.is_none() {
            words.insert(0, "quiet".to_owned());
        }
        if let Execution::Emulated { tsc_khz } = self.execution {
            words.push(format!("tsc_early_khz={tsc_khz}"));
            // The kernel would compare the counter with timer ticks, lose some of those on a busy
            // host, blame the counter, and count ticks from then on: every clone's clock would
            // fall behind whenever the host is busy.
            words.push("tsc=reliable".to_owned());
        }
        words.extend_from_slice(extra);
        words
    }

    /// The devices. Their order is part of the saved machine: see [`LAYOUT`].
    fn devices(&self, option: &mut impl FnMut(&str, String)) {
        option("-chardev", format!("socket,id=monitor,fd={}", self.monitor));
        option("-mon", "chardev=monitor,mode=control".into());

        option("-device", "virtio-serial-device,id=serial".into());
        let console = match &self.console {
            // A comma ends a value and two of them are one.
            Some(path) => format!("file,id=console,path={}", path.replace(',', ",,")),
            None => "null,id=console".to_owned(),
        };
        option("-chardev", console);
        option("-device", "virtconsole,bus=serial.0,chardev=console".into());
        option("-chardev", format!("socket,id=control,fd={}", self.control));
        option("-device", format!("virtserialport,bus=serial.0,chardev=control,name={PORT_NAME}"));

        let source = match &self.disk {
            Disk::NbdSocket(path) => json!({
                "driver": "nbd", "node-name": "root", "discard": "unmap",
                "server": { "type": "unix", "path": path },
            }),
            Disk::RawFile(path) => json!({
                "driver": "file", "node-name": "root", "discard": "unmap", "filename": path,
            }),
        };
        option("-blockdev", source.to_string());
        // Errors go to the guest. The default stops the machine when the host's disk is full.
        option("-device", "virtio-blk-device,drive=root,werror=report,rerror=report".into());

        option("-object", "rng-builtin,id=entropy".into());
        option("-device", "virtio-rng-device,rng=entropy".into());

        if let Some(Card { tap, mac }) = &self.card {
            let mac: Vec<String> = mac.iter().map(|byte| format!("{byte:02x}")).collect();
            option("-netdev", format!("tap,id=uplink,fd={tap},vhost=off"));
            option("-device", format!("virtio-net-device,netdev=uplink,mac={}", mac.join(":")));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan() -> Plan {
        Plan {
            name: "m1".into(),
            execution: Execution::Emulated { tsc_khz: 2_000_000 },
            vcpus: Vcpus(2),
            memory: MiB(256),
            memory_file: "/a,b/memory".into(),
            mapping: Mapping::Shared,
            origin: Origin::Boot { kernel: "/k".into(), cmdline: vec!["extra=1".into()] },
            disk: Disk::RawFile("/d".into()),
            card: Some(Card { tap: 7, mac: [2, 0, 0, 0, 0, 255] }),
            monitor: 5,
            control: 6,
            console: None,
        }
    }

    fn value(args: &[String], option: &str) -> String {
        let at = args.iter().position(|arg| arg == option).expect("the option is there");
        args[at + 1].clone()
    }

    #[test]
    fn memory_is_shared_or_private_and_states_are_told_apart() {
        let booting = plan().arguments();
        assert!(value(&booting, "-object").contains(r#""share":true"#));
        assert!(value(&booting, "-append").starts_with("quiet panic=-1"));
        assert!(value(&booting, "-append").ends_with("tsc_early_khz=2000000 tsc=reliable extra=1"));
        let private = Plan { mapping: Mapping::Private, ..plan() };
        let saved = Plan { origin: Origin::Saved(StateKind::Stream), ..private.clone() };
        let saved = saved.arguments();
        let memory = value(&saved, "-object");
        assert!(memory.contains(r#""share":false"#) && memory.contains(r#""readonly":true"#));
        assert!(memory.contains(r#""mem-path":"/a,b/memory""#));
        assert_eq!(value(&saved, "-incoming"), "defer");
        assert!(!saved.iter().any(|arg| arg == "-kernel" || arg.contains("send-configuration")));
        let devices = Plan { origin: Origin::Saved(StateKind::Devices), ..private };
        let off = "migration.send-configuration=off";
        assert!(devices.arguments().windows(2).any(|pair| pair == ["-global", off]));
    }

    #[test]
    fn both_origins_have_the_same_devices() {
        let devices = |plan: Plan| -> Vec<String> {
            plan.arguments().into_iter().filter(|arg| arg.contains("-device")).collect()
        };
        assert_eq!(
            devices(plan()),
            devices(Plan { origin: Origin::Saved(StateKind::Devices), ..plan() })
        );
        let quiet = devices(plan());
        assert_eq!(quiet, devices(Plan { console: Some("/log".into()), ..plan() }));
        assert!(plan().arguments().iter().any(|arg| arg.ends_with("mac=02:00:00:00:00:ff")));
    }

    #[test]
    fn kvm_is_handed_over_and_measures_time_itself() {
        let args = Plan { execution: Execution::Kvm { device: 9 }, ..plan() }.arguments();
        assert_eq!(value(&args, "-add-fd"), "fd=9,set=1");
        assert_eq!(value(&args, "-accel"), "kvm,device=/dev/fdset/1");
        assert!(!value(&args, "-append").contains("tsc"));
        assert!(!plan().arguments().iter().any(|arg| arg.contains("kvm")));
    }

    #[test]
    fn the_marker_is_in_the_command_line() {
        let args = plan().arguments();
        assert!(args.windows(2).any(|pair| pair == marker("m1")));
    }
}
