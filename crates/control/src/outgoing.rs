//! HTTP clients for calls out of the control plane: identity providers and webhooks.
//!
//! Every client carries its own TLS settings, so that nothing here depends on a default of the
//! process, which another library could have set first.

use std::sync::Arc;

use rustls::{ClientConfig, RootCertStore};
use tracing::warn;

/// A client that trusts the host's certificate authorities (`SSL_CERT_FILE` and `SSL_CERT_DIR` are
/// heard, as in other programs), follows no redirect and ignores proxies named in the environment:
/// where a request goes is the caller's decision alone.
///
/// Reads the certificates from disk: call it at start, not in a request. Deadlines are the
/// caller's to add.
///
/// # Errors
/// When the TLS library refuses its own settings, which would be a defect of the build.
pub(crate) fn client_builder() -> Result<reqwest::ClientBuilder, rustls::Error> {
    Ok(reqwest::Client::builder()
        .tls_backend_preconfigured(tls()?)
        .redirect(reqwest::redirect::Policy::none())
        .referer(false)
        .no_proxy())
}

fn tls() -> Result<ClientConfig, rustls::Error> {
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    // One certificate this library cannot read must not cost the others.
    let (_usable, _unreadable) = roots.add_parsable_certificates(found.certs);
    if roots.is_empty() {
        let reason = found.errors.first().map(ToString::to_string);
        warn!(reason, "no certificate authorities are installed; calls to https addresses fail");
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    Ok(ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_needs_no_provider_of_the_process() {
        assert!(rustls::crypto::CryptoProvider::get_default().is_none());
        client_builder().expect("settings").build().expect("a client");
        assert!(rustls::crypto::CryptoProvider::get_default().is_none());
    }
}
