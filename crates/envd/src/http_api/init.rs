//! `POST /init`: takes on an identity over HTTP. The control port does the same in a guest; this
//! route serves hosts without one, and the same daemon in tests.

use std::collections::BTreeMap;
use std::path::Path;

use axum::extract::State as Shared;
use axum::response::{IntoResponse as _, Response};
use belljar_domain::Secret;
use bytes::Bytes;
use http::{HeaderMap, StatusCode};
use serde::Deserialize;

use super::{Services, json_error};
use crate::auth;
use crate::guest;
use crate::guest::certificates::Authorities;
use crate::state::{NewIdentity, State, TokenCheck};
use crate::task;

/// The body; every field may be absent.
///
/// Source: `contract/e2b-wire.md` section 2.1.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct InitRequest {
    env_vars: Option<BTreeMap<String, String>>,
    access_token: Option<String>,
    timestamp: Option<String>,
    default_user: Option<String>,
    default_workdir: Option<String>,
    volume_mounts: Vec<serde_json::Value>,
    ca_bundle: Option<String>,
}

/// Answers 204 once requests meet the new identity.
///
/// A sandbox that has a token takes the new identity only from someone who knows it, by header or
/// body; a request older than one already applied is a replay and changes nothing.
pub(super) async fn post(
    Shared(services): Shared<Services>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let request: InitRequest = if body.is_empty() {
        InitRequest::default()
    } else {
        match serde_json::from_slice(&body) {
            Ok(request) => request,
            Err(error) => {
                return json_error(StatusCode::BAD_REQUEST, &format!("invalid body: {error}"));
            }
        }
    };
    let state = &services.state;
    let in_body = request.access_token.as_deref().filter(|token| !token.is_empty());
    let known = |token: Option<&[u8]>| {
        matches!(state.check_token(token), TokenCheck::Open | TokenCheck::Right)
    };
    if !known(auth::token(&headers)) && !known(in_body.map(str::as_bytes)) {
        let message = "access token validation failed";
        return json_error(StatusCode::UNAUTHORIZED, message);
    }
    let authorities = match unusual(state, &request) {
        Ok(authorities) => authorities,
        Err(message) => return json_error(StatusCode::BAD_REQUEST, &message),
    };
    if let Some(text) = &request.timestamp {
        let Some(unix_ns) = parse_rfc3339(text) else {
            let message = format!("invalid timestamp '{text}'");
            return json_error(StatusCode::BAD_REQUEST, &message);
        };
        if !state.accept_init_time(unix_ns) {
            return StatusCode::NO_CONTENT.into_response();
        }
        if state.settings().in_guest
            && let Ok(unix_ns) = u64::try_from(unix_ns)
            && let Err(error) = guest::set_clock(unix_ns)
        {
            tracing::warn!(%error, "failed to set the clock");
        }
    }
    // Before the disks are written: they may be stopped.
    state.thaw();
    if let Some(authorities) = authorities
        && let Err(message) = trust(authorities).await
    {
        return json_error(StatusCode::INTERNAL_SERVER_ERROR, &message);
    }
    let token = in_body.map(|token| Secret::new(token.to_owned())).or(state.access_token());
    state.become_sandbox(NewIdentity {
        // It came over one of the connections that would be dropped.
        new_run: false,
        sandbox_id: None,
        template_id: None,
        access_token: token,
        env_vars: request.env_vars.unwrap_or_else(|| state.own_env()),
        default_user: request.default_user,
        default_workdir: request.default_workdir,
    });
    StatusCode::NO_CONTENT.into_response()
}

/// What of a request not every daemon can do: the authorities to install, or why not.
fn unusual(state: &State, request: &InitRequest) -> Result<Option<Authorities>, String> {
    if !request.volume_mounts.is_empty() {
        let message = "volumeMounts are not supported by this daemon; leave them out";
        return Err(message.to_owned());
    }
    let Some(bundle) = &request.ca_bundle else { return Ok(None) };
    if !state.settings().in_guest {
        // An empty one asks for the state a host is in anyway.
        let message = "caBundle is not supported in host mode: this machine is not a sandbox's";
        return if bundle.is_empty() { Ok(None) } else { Err(message.to_owned()) };
    }
    let authorities = Authorities::parse(bundle);
    authorities.map(Some).map_err(|error| format!("failed to {error}; send PEM certificates"))
}

async fn trust(authorities: Authorities) -> Result<(), String> {
    match task::blocking(move || authorities.install(Path::new("/"))).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(format!("failed to install the CA bundle: {error}")),
        Err(lost) => Err(format!("failed to {lost}")),
    }
}

/// Nanoseconds since the Unix epoch of an RFC 3339 time.
fn parse_rfc3339(text: &str) -> Option<i128> {
    let number = |range: std::ops::Range<usize>| -> Option<i64> {
        let digits = text.get(range)?;
        digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse().ok())?
    };
    let (year, month, day) = (number(0..4)?, number(5..7)?, number(8..10)?);
    let (hour, minute, second) = (number(11..13)?, number(14..16)?, number(17..19)?);
    let marks = (text.get(4..5)?, text.get(7..8)?, text.get(13..14)?, text.get(16..17)?);
    let split = matches!(text.as_bytes().get(10), Some(b'T' | b't' | b' '));
    let valid = (1..=12).contains(&month) && (1..=31).contains(&day) && hour < 24 && minute < 60;
    if marks != ("-", "-", ":", ":") || !split || !valid || second > 60 {
        return None;
    }
    let mut rest = text.get(19..)?;
    let mut nanoseconds = 0;
    if let Some(fraction) = rest.strip_prefix('.') {
        let digits = fraction.bytes().take_while(u8::is_ascii_digit).count();
        let padded = format!("{:0<9}", fraction.get(..digits.min(9))?);
        nanoseconds = padded.parse::<i128>().ok()?;
        rest = fraction.get(digits..)?;
    }
    let offset_s = match rest.as_bytes() {
        [b'Z' | b'z'] => 0,
        [sign @ (b'+' | b'-'), _, _, b':', _, _] => {
            let seconds = rest.get(1..3)?.parse::<i64>().ok()? * 3600
                + rest.get(4..6)?.parse::<i64>().ok()? * 60;
            if *sign == b'-' { -seconds } else { seconds }
        }
        _ => return None,
    };
    let seconds =
        days_since_epoch(year, month, day) * 86_400 + hour * 3600 + minute * 60 + second - offset_s;
    Some(i128::from(seconds) * 1_000_000_000 + nanoseconds)
}

/// Days from 1970-01-01 in the Gregorian calendar; years start in March, so that the leap day is
/// the last day of a year.
fn days_since_epoch(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let month = (month + 9) % 12;
    let era_days = year.div_euclid(400) * 146_097;
    let year = year.rem_euclid(400);
    era_days + year * 365 + year / 4 - year / 100 + (month * 153 + 2) / 5 + day - 1 - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_become_nanoseconds() {
        let second = 1_000_000_000;
        for (text, expected) in [
            ("1970-01-01T00:00:00Z", Some(0)),
            ("2000-03-01T00:00:00Z", Some(951_868_800 * second)),
            ("2024-02-29T12:34:56Z", Some(1_709_210_096 * second)),
            ("2024-02-29T12:34:56.25Z", Some(1_709_210_096 * second + second / 4)),
            ("2024-02-29T14:34:56+02:00", Some(1_709_210_096 * second)),
            ("1969-12-31T23:59:59-00:00", Some(-second)),
            ("2024-02-29T12:34:56", None),
            ("2024-13-29T12:34:56Z", None),
            ("2024-02-29X12:34:56Z", None),
            ("yesterday", None),
            ("", None),
        ] {
            assert_eq!(parse_rfc3339(text), expected, "{text}");
        }
    }

    #[test]
    fn any_time_is_read_or_refused() {
        crate::fuzz::run("rfc3339", &["T", "Z", "+00:00", ".", ":", "-"], |input| {
            let text = String::from_utf8_lossy(input);
            let Some(unix_ns) = parse_rfc3339(&text) else { return 0 };
            let years = unix_ns / 1_000_000_000 / 31_556_952;
            assert!((-1972..=8031).contains(&years), "{text} is {unix_ns}");
            // The same instant, said another way.
            if let Some(local) = text.strip_suffix('Z') {
                assert_eq!(parse_rfc3339(&format!("{local}+00:00")), Some(unix_ns));
                // Another implementation tells the same time of day, but has no leap seconds.
                let seconds = u64::try_from(unix_ns / 1_000_000_000);
                let clock = text.get(11..19).filter(|clock| !clock.ends_with("60"));
                if let (Ok(seconds @ 0..250_000_000_000), Some(clock)) = (seconds, clock) {
                    let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
                    let shown = httpdate::fmt_http_date(time);
                    assert!(unix_ns < 0 || shown.contains(clock), "{text} is {shown}");
                }
            }
            crate::fuzz::outcome(years)
        });
    }
}
