//! What a create request asks for: its checks, its defaults, and what this server cannot do yet.
//!
//! A field that asks for something unsupported is refused by name rather than ignored: a sandbox
//! without the isolation, volume or rule its owner asked for is worse than none.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use belljar_domain::Secret;
use belljar_wire::rest::{NewSandbox, SandboxNetwork};

use super::error::ApiError;
use crate::creation::CreateSpec;
use crate::limits::hours;
use crate::live::{Lifecycle, OnEnd};

/// The rule that closes the internet. Source: contract section 1.2.
const ALL_IPV4: &str = "0.0.0.0/0";

/// Seconds to live as a duration within the limits.
pub(crate) fn lifetime(seconds: i64, max: Duration) -> Result<Duration, ApiError> {
    let seconds = u64::try_from(seconds).unwrap_or(0);
    if seconds == 0 {
        return Err(ApiError::bad_request("Timeout must be greater than 0"));
    }
    if seconds > max.as_secs() {
        let hours = hours(max);
        return Err(ApiError::bad_request(format!("Timeout cannot be greater than {hours}")));
    }
    Ok(Duration::from_secs(seconds))
}

/// Checks a create request. `secure` and the default lifetime differ by version of the call.
pub(crate) fn spec(
    body: NewSandbox,
    default_seconds: i64,
    secure: bool,
    max: Duration,
) -> Result<CreateSpec, ApiError> {
    let template = body.template_id.parse()?;
    let lifetime = lifetime(body.timeout.unwrap_or(default_seconds), max)?;
    refuse_unsupported(&body)?;
    let lifecycle = lifecycle(&body, lifetime)?;
    let closed = body.network.as_ref().map(closes_internet).transpose()?.unwrap_or(false);
    let env_vars = body.env_vars.unwrap_or_default();
    check_env_vars(&env_vars)?;
    let metadata = body.metadata.unwrap_or_default();
    check_metadata(&metadata)?;
    Ok(CreateSpec {
        template,
        lifetime,
        metadata,
        env_vars: Arc::new(Secret::new(env_vars)),
        secure,
        allow_internet: body.allow_internet_access.unwrap_or(true) && !closed,
        lifecycle,
        key: None,
    })
}

/// What is to happen at the end of its time, and after it. Source of the rules: contract section 1.2.
fn lifecycle(body: &NewSandbox, lifetime: Duration) -> Result<Lifecycle, ApiError> {
    let pauses = body.auto_pause == Some(true);
    let filesystem_only = body.auto_pause_memory == Some(false);
    let auto_resume = body.auto_resume.as_ref().is_some_and(|resume| resume.enabled);
    if filesystem_only && !pauses {
        return Err(ApiError::bad_request(
            "the field 'autoPauseMemory' may only be false with 'autoPause'",
        ));
    }
    if auto_resume && !pauses {
        return Err(ApiError::bad_request("the field 'autoResume' needs 'autoPause'"));
    }
    if auto_resume && filesystem_only {
        return Err(ApiError::bad_request(
            "the field 'autoResume' does not go with 'autoPauseMemory' false: a sandbox without \
             its memory would have to boot",
        ));
    }
    let on_end = if pauses { OnEnd::Pause { filesystem_only } } else { OnEnd::Kill };
    Ok(Lifecycle { on_end, auto_resume, lifetime })
}

fn unsupported(field: &str) -> ApiError {
    ApiError::bad_request(format!(
        "the field '{field}' asks for what this server does not support yet"
    ))
}

fn refuse_unsupported(body: &NewSandbox) -> Result<(), ApiError> {
    let has_tokens =
        body.iam.as_ref().and_then(|iam| iam.tokens.as_ref()).is_some_and(|t| !t.is_empty());
    let has_volumes = body.volume_mounts.as_ref().is_some_and(|mounts| !mounts.is_empty());
    let asked = [("mcp", body.mcp.is_some()), ("iam", has_tokens), ("volumeMounts", has_volumes)];
    match asked.into_iter().find(|(_, asked)| *asked) {
        Some((field, _)) => Err(unsupported(field)),
        None => Ok(()),
    }
}

/// Whether the rules come to "no internet": the one rule there is so far.
fn closes_internet(network: &SandboxNetwork) -> Result<bool, ApiError> {
    let deny = network.deny_out.as_deref().unwrap_or_default();
    let closed = deny.iter().any(|rule| rule == ALL_IPV4);
    let asked = [
        ("network.allowPublicTraffic", network.allow_public_traffic == Some(false)),
        ("network.allowOut", network.allow_out.as_ref().is_some_and(|rules| !rules.is_empty())),
        ("network.denyOut", !deny.is_empty() && !closed),
        ("network.egressProxy", network.egress_proxy.is_some()),
        ("network.maskRequestHost", network.mask_request_host.is_some()),
        ("network.rules", network.rules.as_ref().is_some_and(|rules| !rules.is_empty())),
        ("network.dnsServers", network.dns_servers.is_some()),
        ("network.httpsPorts", network.https_ports.as_ref().is_some_and(|p| !p.is_empty())),
    ];
    match asked.into_iter().find(|(_, asked)| *asked) {
        Some((field, _)) => Err(unsupported(field)),
        None => Ok(closed),
    }
}

/// Longest `NAME=value` a process can be started with, in bytes. Source: Linux `MAX_ARG_STRLEN`.
const ENV_VAR_MAX_BYTES: usize = 128 << 10;
/// Longest environment of a sandbox, in bytes. Escaped as JSON it can grow sixfold, and the line
/// that carries it to the guest holds 4 MiB.
const ENV_VARS_MAX_BYTES: usize = 512 << 10;

/// Longest metadata of a sandbox, in bytes of JSON. It is kept in memory, in the store, on the node
/// and in every answer that lists the sandbox.
const METADATA_MAX_BYTES: usize = 64 << 10;

fn check_metadata(metadata: &BTreeMap<String, String>) -> Result<(), ApiError> {
    let bytes = serde_json::to_vec(metadata).expect("a map of strings has a JSON form").len();
    if bytes > METADATA_MAX_BYTES {
        return Err(ApiError::bad_request(format!(
            "the field 'metadata' is too large: it has {bytes} bytes as JSON and may have \
             {METADATA_MAX_BYTES}; keep large data elsewhere and refer to it"
        )));
    }
    Ok(())
}

/// Refuses what no process environment can hold.
fn check_env_vars(env_vars: &BTreeMap<String, String>) -> Result<(), ApiError> {
    let mut total_bytes: usize = 0;
    for (name, value) in env_vars {
        let bytes = name.len() + value.len() + 2;
        total_bytes = total_bytes.saturating_add(bytes);
        if bytes > ENV_VAR_MAX_BYTES || total_bytes > ENV_VARS_MAX_BYTES {
            return Err(ApiError::bad_request(format!(
                "the field 'envVars' is too large: a variable holds {ENV_VAR_MAX_BYTES} bytes \
                 and all of them {ENV_VARS_MAX_BYTES}"
            )));
        }
        if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
            return Err(ApiError::bad_request(format!(
                "the field 'envVars' is not valid: {name:?} cannot be set in an environment"
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: Duration = Duration::from_secs(86_400);

    fn checked(json: &str) -> Result<CreateSpec, ApiError> {
        spec(serde_json::from_str(json).expect("a body"), 15, true, DAY)
    }

    #[test]
    fn defaults_and_no_op_values_are_fine() {
        for json in [
            r#"{"templateID":"base"}"#,
            r#"{"templateID":"base","metadata":{},"envVars":{},"secure":true,"autoPause":false}"#,
            r#"{"templateID":"base","timeout":null,"mcp":null,"network":null,"iam":null}"#,
            r#"{"templateID":"base","autoPauseMemory":true,"autoResume":{"enabled":false}}"#,
            r#"{"templateID":"base","network":{"allowPublicTraffic":true,"allowOut":[],"denyOut":[],
                "rules":{}},"volumeMounts":[],"iam":{"tokens":{}},"future":1}"#,
        ] {
            let spec = checked(json).expect(json);
            assert_eq!(spec.lifetime, Duration::from_secs(15));
            assert!(spec.allow_internet);
        }
    }

    #[test]
    fn the_internet_can_be_closed_in_two_ways() {
        for json in [
            r#"{"templateID":"base","allow_internet_access":false}"#,
            r#"{"templateID":"base","network":{"denyOut":["0.0.0.0/0"]}}"#,
        ] {
            assert!(!checked(json).expect(json).allow_internet, "{json}");
        }
    }

    #[test]
    fn what_is_not_supported_is_refused_by_name() {
        for (field, value) in [
            ("mcp", "{}"),
            ("iam", r#"{"tokens":{"a":{"audience":"x","tokenType":"JWT-SVID"}}}"#),
            ("volumeMounts", r#"[{"name":"v","path":"/v"}]"#),
        ] {
            let json = format!(r#"{{"templateID":"base","{field}":{value}}}"#);
            let error = format!("{:?}", checked(&json).expect_err(field));
            assert!(error.contains(&format!("'{field}'")), "{error}");
        }
        for (field, value) in [
            ("allowPublicTraffic", "false"),
            ("allowOut", r#"["1.1.1.1"]"#),
            ("denyOut", r#"["1.1.1.1"]"#),
            ("egressProxy", r#"{"address":"a:1"}"#),
            ("maskRequestHost", r#""x""#),
            ("rules", r#"{"a.b":[]}"#),
            ("dnsServers", "[]"),
            ("httpsPorts", "[443]"),
        ] {
            let json = format!(r#"{{"templateID":"base","network":{{"{field}":{value}}}}}"#);
            let error = format!("{:?}", checked(&json).expect_err(field));
            assert!(error.contains(&format!("'network.{field}'")), "{error}");
        }
    }

    #[test]
    fn what_happens_at_the_end_has_rules() {
        let on_end = |fields: &str| {
            let json = format!(r#"{{"templateID":"base",{fields}}}"#);
            checked(&json).map(|spec| (spec.lifecycle.on_end, spec.lifecycle.auto_resume))
        };
        let pause = |filesystem_only| OnEnd::Pause { filesystem_only };
        for (fields, expected) in [
            (r#""autoPause":false"#, (OnEnd::Kill, false)),
            (r#""autoPause":true"#, (pause(false), false)),
            (r#""autoPause":true,"autoPauseMemory":false"#, (pause(true), false)),
            (r#""autoPause":true,"autoResume":{"enabled":true}"#, (pause(false), true)),
        ] {
            assert_eq!(on_end(fields), Ok(expected), "{fields}");
        }
        for (fields, text) in [
            (r#""autoPauseMemory":false"#, "may only be false with 'autoPause'"),
            (r#""autoResume":{"enabled":true}"#, "'autoResume' needs 'autoPause'"),
            (
                r#""autoPause":true,"autoPauseMemory":false,"autoResume":{"enabled":true}"#,
                "does not go with 'autoPauseMemory' false",
            ),
        ] {
            let error = format!("{:?}", on_end(fields).expect_err(fields));
            assert!(error.contains(text), "{error}");
        }
    }

    #[test]
    fn lifetimes_have_limits() {
        for seconds in [0, -1, i64::MIN] {
            let error = lifetime(seconds, DAY).expect_err("too short");
            assert_eq!(error, ApiError::bad_request("Timeout must be greater than 0"));
        }
        for seconds in [86_401, i64::MAX] {
            let error = lifetime(seconds, DAY).expect_err("too long");
            assert_eq!(error, ApiError::bad_request("Timeout cannot be greater than 24 hours"));
        }
        assert_eq!(lifetime(86_400, DAY), Ok(DAY));
    }

    #[test]
    fn metadata_has_a_limit_over_all() {
        let body = |bytes: usize| {
            let half = "a".repeat(bytes / 2);
            format!(r#"{{"templateID":"base","metadata":{{"a":"{half}","b":"{half}"}}}}"#)
        };
        assert!(checked(&body(METADATA_MAX_BYTES - 100)).is_ok());
        let error = format!("{:?}", checked(&body(METADATA_MAX_BYTES)).expect_err("too large"));
        assert!(error.contains("the field 'metadata'"), "{error}");
    }

    #[test]
    fn impossible_environments_are_refused() {
        for json in [
            r#"{"templateID":"base","envVars":{"":"x"}}"#,
            r#"{"templateID":"base","envVars":{"A=B":"x"}}"#,
            r#"{"templateID":"base","envVars":{"A":"\u0000"}}"#,
        ] {
            assert!(checked(json).is_err(), "{json}");
        }
    }
}
