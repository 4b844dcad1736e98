//! The HTTP client under the S3 client: the host's certificate authorities and the crypto library
//! the other clients of this program use, so that nothing depends on a default of the process.

use std::sync::Arc;

use object_store::ClientOptions;
use object_store::client::{HttpClient, HttpConnector};
use rustls::{ClientConfig, RootCertStore};

use super::S3Patience;

#[derive(Debug)]
pub(super) struct Connector {
    pub(super) patience: S3Patience,
}

impl HttpConnector for Connector {
    fn connect(&self, _options: &ClientOptions) -> Result<HttpClient, object_store::Error> {
        let failed = |source| object_store::Error::Generic { store: "S3", source };
        let tls = tls().map_err(|e| failed(e.into()))?;
        let client = reqwest::Client::builder()
            .tls_backend_preconfigured(tls)
            .redirect(reqwest::redirect::Policy::none())
            // Where blobs go is the operator's setting alone.
            .no_proxy()
            .connect_timeout(self.patience.connect)
            .timeout(self.patience.request)
            // One connection a request in flight: bodies are large, and servers differ in their HTTP/2.
            .http1_only()
            .build()
            .map_err(|e| failed(e.into()))?;
        Ok(HttpClient::new(client))
    }
}

fn tls() -> Result<ClientConfig, rustls::Error> {
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    // One certificate this library cannot read must not cost the others.
    let (_usable, _unreadable) = roots.add_parsable_certificates(found.certs);
    if roots.is_empty() {
        let reason = found.errors.first().map(ToString::to_string);
        tracing::warn!(reason, "no certificate authorities are installed; https endpoints fail");
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    Ok(ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth())
}
