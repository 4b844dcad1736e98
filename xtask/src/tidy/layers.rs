//! Imports point down: programs > services > sandbox > host > ground. Siblings never meet.

use std::path::Path;

use super::Report;
use crate::places::{Dependency, Package};

/// Which crates of this workspace a crate may use, all without their prefix.
///
/// ```text
/// programs   cli  envd
/// services   control  proxy  node  builder
/// sandbox    sandbox
/// host       runtime  blockstore  network
/// ground     wire  daemon  domain
/// ```
const ALLOWED: &[(&str, &[&str])] = &[
    ("domain", &[]),
    ("wire", &["domain"]),
    ("daemon", &["domain"]),
    ("runtime", GROUND),
    ("blockstore", GROUND),
    ("network", GROUND),
    ("sandbox", HOST_AND_GROUND),
    ("control", GROUND),
    ("proxy", GROUND),
    ("node", SANDBOX_AND_BELOW),
    ("builder", SANDBOX_AND_BELOW),
    ("cli", SERVICES_AND_BELOW),
    // The guest daemon is small: the ground, and of `daemon` only what its features leave out.
    ("envd", GROUND),
    // For tests only, so it may see everything but the programs.
    ("testkit", SERVICES_AND_BELOW),
    ("xtask", &[]),
];

const GROUND: &[&str] = &["wire", "daemon", "domain"];
const HOST_AND_GROUND: &[&str] = &["runtime", "blockstore", "network", "wire", "daemon", "domain"];
const SANDBOX_AND_BELOW: &[&str] =
    &["sandbox", "runtime", "blockstore", "network", "wire", "daemon", "domain"];
const SERVICES_AND_BELOW: &[&str] = &[
    "control",
    "proxy",
    "node",
    "builder",
    "sandbox",
    "runtime",
    "blockstore",
    "network",
    "wire",
    "daemon",
    "domain",
];
/// What any crate may use in its tests.
const TEST_ONLY: &str = "testkit";
const RULE: &str = "layers";

/// The crate's name inside the workspace.
pub(super) fn short_name(name: &str) -> &str {
    name.strip_prefix("belljar-").unwrap_or(name)
}

pub(super) fn check(packages: &[Package], root: &Path, report: &mut Report) {
    for package in packages {
        let name = short_name(&package.name);
        let manifest = package.manifest_path.strip_prefix(root).unwrap_or(&package.manifest_path);
        let Some((_, allowed)) = ALLOWED.iter().find(|(each, _)| *each == name) else {
            let advice = format!(
                "`{name}` has no layer: write a decision record, then add it to {} and to the \
                 table in xtask/src/tidy/layers.rs",
                "ARCHITECTURE.md"
            );
            report.find(manifest, 1, RULE, advice);
            continue;
        };
        for dependency in package.dependencies.iter().filter(|each| each.path.is_some()) {
            if let Some(advice) = forbidden(name, allowed, dependency) {
                report.find(manifest, line_of(root, manifest, &dependency.name), RULE, advice);
            }
        }
    }
}

fn forbidden(name: &str, allowed: &[&str], dependency: &Dependency) -> Option<String> {
    let used = short_name(&dependency.name);
    let is_for_tests = dependency.kind.as_deref() == Some("dev");
    if used == TEST_ONLY {
        return (!is_for_tests)
            .then(|| format!("`{TEST_ONLY}` is for tests: move it to [dev-dependencies]"));
    }
    if allowed.contains(&used) {
        return None;
    }
    let may = if allowed.is_empty() { "no crate of ours".to_owned() } else { allowed.join(", ") };
    Some(format!(
        "`{name}` may not use `{used}` (it may use {may}): pass a domain type or a trait, or meet \
         in `cli`; a new edge needs a decision record"
    ))
}

/// The line that names the dependency; 1 if the manifest cannot be read.
fn line_of(root: &Path, manifest: &Path, dependency: &str) -> usize {
    let text = std::fs::read_to_string(root.join(manifest)).unwrap_or_default();
    let at = text.lines().position(|line| {
        line.strip_prefix(dependency).is_some_and(|rest| rest.starts_with([' ', '=', '.']))
    });
    at.map_or(1, |index| index + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(name: &str, uses: &[(&str, Option<&str>)]) -> Package {
        Package {
            name: format!("belljar-{name}"),
            manifest_path: format!("/r/crates/{name}/Cargo.toml").into(),
            dependencies: uses
                .iter()
                .map(|(used, kind)| Dependency {
                    name: format!("belljar-{used}"),
                    kind: kind.map(str::to_owned),
                    path: Some("/r".into()),
                })
                .collect(),
        }
    }

    fn count(package: Package) -> usize {
        let mut report = Report::default();
        check(&[package], Path::new("/r"), &mut report);
        report.findings.len()
    }

    #[test]
    fn down_is_allowed_and_up_and_sideways_are_not() {
        assert_eq!(count(package("sandbox", &[("runtime", None), ("domain", None)])), 0);
        assert_eq!(count(package("runtime", &[("sandbox", None)])), 1);
        assert_eq!(count(package("control", &[("proxy", None)])), 1);
        assert_eq!(count(package("envd", &[("daemon", None)])), 0);
        assert_eq!(count(package("envd", &[("runtime", None)])), 1);
        assert_eq!(count(package("cli", &[("envd", None)])), 1);
        assert_eq!(count(package("domain", &[("wire", Some("dev"))])), 1);
    }

    #[test]
    fn testkit_is_for_tests() {
        assert_eq!(count(package("runtime", &[("testkit", Some("dev"))])), 0);
        assert_eq!(count(package("runtime", &[("testkit", None)])), 1);
    }

    #[test]
    fn a_crate_without_a_layer_is_a_finding() {
        assert_eq!(count(package("extras", &[])), 1);
    }

    #[test]
    fn the_table_points_down_only() {
        for (name, allowed) in ALLOWED {
            for used in *allowed {
                let (_, below) = ALLOWED.iter().find(|(each, _)| each == used).unwrap();
                assert!(!below.contains(name), "{name} and {used} may use each other");
            }
        }
    }
}
