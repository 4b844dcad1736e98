//! What commands print: one JSON value, or a table.

use anyhow::Result;
use comfy_table::{Table, presets};
use serde::Serialize;

/// Prints one line of JSON.
pub(crate) fn json<T: Serialize>(value: &T) -> Result<()> {
    use std::io::Write as _;
    let mut out = std::io::stdout().lock();
    serde_json::to_writer(&mut out, value)?;
    writeln!(out)?;
    out.flush()?;
    Ok(())
}

/// Prints one line of text.
pub(crate) fn line(text: &str) -> Result<()> {
    use std::io::Write as _;
    let mut out = std::io::stdout().lock();
    writeln!(out, "{text}")?;
    out.flush()?;
    Ok(())
}

/// Prints a table, or one sentence when it has no rows.
pub(crate) fn table(header: &[&str], rows: Vec<Vec<String>>, empty: &str) -> Result<()> {
    if rows.is_empty() {
        return line(empty);
    }
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(header);
    table.add_rows(rows);
    line(&table.to_string())
}
