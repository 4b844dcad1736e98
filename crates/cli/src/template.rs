//! `belljar template list|rootfs|build`.

use std::process::ExitCode;

use anyhow::Result;
use belljar_wire::rest::Template;

use crate::api::{Api, Target};
use crate::output;

pub(crate) async fn list(target: Target, as_json: bool) -> Result<ExitCode> {
    let templates: Vec<Template> = Api::new(target).get("/templates").await?;
    if as_json {
        output::json(&templates)?;
        return Ok(ExitCode::SUCCESS);
    }
    let rows = templates
        .iter()
        .map(|t| {
            vec![
                t.aliases.join(", "),
                t.template_id.clone(),
                t.build_id.clone(),
                t.cpu_count.to_string(),
                format!("{} MiB", t.memory_mb),
                format!("{} MiB", t.disk_size_mb),
            ]
        })
        .collect();
    let header = ["NAME", "TEMPLATE", "BUILD", "CPUS", "MEMORY", "DISK"];
    output::table(&header, rows, "No template is there yet: `belljar template build --help`.")?;
    Ok(ExitCode::SUCCESS)
}
