//! What sandboxes use, as the node samples it.

use belljar_domain::{SandboxId, UnixMillis};
use belljar_wire::rpc::belljar::node::v1::{MetricsSample, SandboxMetricsRequest};

use super::{CALL_DEADLINE, Node, NodeCallError, within};

/// What a sandbox used at a moment. All of it but the time is its guest's word.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Sample {
    pub(crate) at: UnixMillis,
    pub(crate) cpu_count: u32,
    /// Of all processors together; a number from 0 to 100.
    pub(crate) cpu_used_percent: f32,
    pub(crate) mem_used_bytes: u64,
    pub(crate) mem_total_bytes: u64,
    pub(crate) mem_cache_bytes: u64,
    pub(crate) disk_used_bytes: u64,
    pub(crate) disk_total_bytes: u64,
}

/// From when to when; both ends count, and may be open.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) start: Option<UnixMillis>,
    pub(crate) end: Option<UnixMillis>,
}

impl Node {
    /// The samples of one sandbox in `span`, oldest first. None when it does not run there.
    pub(crate) async fn samples(
        &self,
        id: &SandboxId,
        span: Span,
    ) -> Result<Vec<Sample>, NodeCallError> {
        let found = self.metrics(std::slice::from_ref(id), span, false).await?;
        let samples = found.into_iter().flat_map(|(_, samples)| samples);
        Ok(samples.collect())
    }

    /// The newest sample of each of `ids`, which are not to be none. Those without are left out.
    pub(crate) async fn newest_samples(
        &self,
        ids: &[SandboxId],
    ) -> Result<Vec<(SandboxId, Sample)>, NodeCallError> {
        let found = self.metrics(ids, Span::default(), true).await?;
        let newest = |(id, mut samples): (_, Vec<_>)| Some((id, samples.pop()?));
        Ok(found.into_iter().filter_map(newest).collect())
    }

    async fn metrics(
        &self,
        ids: &[SandboxId],
        span: Span,
        latest_only: bool,
    ) -> Result<Vec<(SandboxId, Vec<Sample>)>, NodeCallError> {
        let request = SandboxMetricsRequest {
            sandbox_ids: ids.iter().map(ToString::to_string).collect(),
            start_unix_ms: span.start.map(|at| at.0),
            end_unix_ms: span.end.map(|at| at.0),
            latest_only,
            ..Default::default()
        };
        let answer = self
            .client
            .sandbox_metrics_with_options(request, within(CALL_DEADLINE))
            .await
            .map_err(|source| NodeCallError { what: "read what sandboxes use", source })?
            .into_owned();
        let readable = answer.sandboxes.into_iter().filter_map(|found| {
            let id: SandboxId = found.sandbox_id.parse().ok()?;
            // What nobody asked for must reach nobody.
            ids.contains(&id).then(|| (id, found.samples.into_iter().map(sample).collect()))
        });
        Ok(readable.collect())
    }
}

fn sample(sample: MetricsSample) -> Sample {
    let percent = sample.cpu_used_pct;
    Sample {
        at: UnixMillis(sample.at_unix_ms),
        cpu_count: sample.cpu_count,
        // JSON has no word for what is not a number.
        cpu_used_percent: if percent.is_finite() { percent.clamp(0.0, 100.0) } else { 0.0 },
        mem_used_bytes: sample.mem_used_bytes,
        mem_total_bytes: sample.mem_total_bytes,
        mem_cache_bytes: sample.mem_cache_bytes,
        disk_used_bytes: sample.disk_used_bytes,
        disk_total_bytes: sample.disk_total_bytes,
    }
}
