//! Which modules of Debian's kernel the outer machine loads, and in which order.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// What is asked for, with its parameters; what these need comes along.
pub(super) const WANTED: &[(&str, &str)] = &[
    // Ports to the host, its files, and entropy.
    ("virtio_pci", ""),
    ("virtio_console", ""),
    ("9pnet_virtio", ""),
    ("9p", ""),
    ("overlay", ""),
    ("virtio_rng", ""),
    // Guests of guests of guests are nobody's test, and cost every exit a check.
    ("kvm_amd", "nested=0"),
    // What sandboxes' network cards, rules and disks need.
    ("tun", ""),
    ("veth", ""),
    // Not named by what uses it: it is found by its algorithm.
    ("crc32c_generic", ""),
    ("nf_tables", ""),
    ("nft_ct", ""),
    ("nft_nat", ""),
    ("nft_chain_nat", ""),
    ("nft_masq", ""),
    ("nbd", "nbds_max=16"),
];

/// The modules a kernel package brings.
pub(super) struct Modules {
    /// By name, with underscores.
    files: BTreeMap<String, PathBuf>,
    built_in: Vec<String>,
}

/// One module to load.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Load {
    pub(super) name: String,
    pub(super) parameters: &'static str,
}

impl Modules {
    /// Looks through `folder`, which is `lib/modules/VERSION` of the package.
    pub(super) fn within(folder: &Path) -> Result<Modules> {
        let mut files = BTreeMap::new();
        let mut folders = vec![folder.join("kernel")];
        while let Some(each) = folders.pop() {
            let entries = std::fs::read_dir(&each)
                .with_context(|| format!("cannot read the modules in {}", each.display()))?;
            for entry in entries {
                let path = entry?.path();
                if path.is_dir() {
                    folders.push(path);
                } else if let Some(name) = module_name(&path) {
                    files.insert(name, path);
                }
            }
        }
        let list = std::fs::read_to_string(folder.join("modules.builtin"))
            .context("cannot read which modules are built in")?;
        let built_in = list.lines().filter_map(|line| module_name(Path::new(line))).collect();
        Ok(Modules { files, built_in })
    }

    /// The file of a module that [`Modules::order`] named.
    pub(super) fn file(&self, name: &str) -> &Path {
        self.files.get(name).expect("only modules that are there are ordered")
    }

    /// What to load, each after what it needs. `content` reads a module's file.
    ///
    /// # Errors
    /// A module is neither there nor built in.
    pub(super) fn order(
        &self,
        wanted: &[(&str, &'static str)],
        mut content: impl FnMut(&Path) -> Result<Vec<u8>>,
    ) -> Result<Vec<Load>> {
        let mut order = Vec::new();
        for (name, parameters) in wanted {
            self.add(name, parameters, &mut order, &mut content)?;
        }
        Ok(order)
    }

    fn add(
        &self,
        name: &str,
        parameters: &'static str,
        order: &mut Vec<Load>,
        content: &mut dyn FnMut(&Path) -> Result<Vec<u8>>,
    ) -> Result<()> {
        let name = name.replace('-', "_");
        if order.iter().any(|load| load.name == name) || self.built_in.contains(&name) {
            return Ok(());
        }
        let Some(file) = self.files.get(&name) else {
            bail!("the kernel package has no module `{name}`");
        };
        for needed in needs(&content(file)?) {
            self.add(&needed, "", order, content)?;
        }
        order.push(Load { name, parameters });
        Ok(())
    }
}

/// `kvm-amd.ko` and `kvm-amd.ko.xz` are both `kvm_amd`.
fn module_name(path: &Path) -> Option<String> {
    let (name, rest) = path.file_name()?.to_str()?.split_once(".ko")?;
    matches!(rest, "" | ".xz").then(|| name.replace('-', "_"))
}

/// What a module says it needs: `depends=a,b`, between zero bytes, in its section of facts.
fn needs(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let value = module[at + KEY.len()..].split(|byte| *byte == 0).next().unwrap_or_default();
    let value = String::from_utf8_lossy(value);
    value.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_come_after_what_they_need_and_once() {
        let names = ["kvm", "kvm_amd", "ccp", "irqbypass"];
        let modules = Modules {
            files: names.iter().map(|name| ((*name).to_owned(), PathBuf::from(name))).collect(),
            built_in: vec!["crc16".to_owned()],
        };
        let content = |path: &Path| {
            Ok(match path.to_str().unwrap() {
                "kvm-amd" | "kvm_amd" => b"x\0depends=kvm,ccp,crc16\0license=GPL\0".to_vec(),
                "kvm" => b"\0depends=irqbypass\0".to_vec(),
                _ => b"\0depends=\0".to_vec(),
            })
        };
        let wanted = [("kvm-amd", "nested=0"), ("kvm", "")];
        let order = modules.order(&wanted, content).unwrap();
        let names: Vec<_> = order.iter().map(|load| load.name.as_str()).collect();
        assert_eq!(names, ["irqbypass", "kvm", "ccp", "kvm_amd"]);
        assert_eq!(order[3].parameters, "nested=0");
        let lost = modules.order(&[("9p", "")], content).unwrap_err();
        assert!(lost.to_string().contains("`9p`"), "{lost}");
    }

    #[test]
    fn names_of_files_are_names_of_modules() {
        let name = |path: &str| module_name(Path::new(path));
        assert_eq!(name("kernel/a/kvm-amd.ko").as_deref(), Some("kvm_amd"));
        assert_eq!(name("tun.ko.xz").as_deref(), Some("tun"));
        assert_eq!(name("modules.dep"), None);
        assert_eq!(name("a.ko.sig"), None);
    }
}
