//! Blobs in a bucket that speaks S3.
//!
//! The client library is async; this module is the bridge. A store owns one worker thread with a
//! runtime of its own, which drives connections; callers block on their own threads. Requests have
//! deadlines, and the library tries again what may be tried again, with growing random pauses.

mod connector;

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use belljar_domain::{Secret, UnixMillis};
use bytes::Bytes;
use futures::TryStreamExt as _;
use object_store::aws::{AmazonS3, AmazonS3Builder, S3ConditionalPut};
use object_store::path::Path;
use object_store::{
    BackoffConfig, ObjectMeta, ObjectStore as _, ObjectStoreExt as _, PutMode, PutOptions,
    PutPayload, RetryConfig, WriteMultipart,
};
use tokio::runtime::{Builder, Runtime};

use super::error::{BlobAction, BlobError, BlobFault};
use super::{BLOB_BYTES_MAX, BlobKey, BlobStat, BlobStore, CREATE_BYTES_MAX, Created};
use connector::Connector;

/// Bodies above this go up in parts of this size. S3 takes parts of 5 MiB and more.
const PART_BYTES: usize = 8 << 20;
/// Parts in flight at once: enough to fill a link, and a bound for memory.
const PARTS_AT_ONCE: usize = 4;

/// Where a bucket is, and who asks.
#[derive(Debug, Clone)]
pub struct S3Options {
    /// The bucket.
    pub bucket: String,
    /// Folder of all blobs in it; empty for its top.
    pub prefix: String,
    /// Its region, such as `eu-central-1`.
    pub region: Option<String>,
    /// Address of a server that is not Amazon's, such as `http://127.0.0.1:9000`. Plain HTTP is taken as it is given.
    pub endpoint: Option<String>,
    /// Key id and secret; without them the machine's own role is asked for some.
    pub credentials: Option<S3Credentials>,
    /// How long one request may take, and how often it is tried.
    pub patience: S3Patience,
}

/// A key of an S3 account.
#[derive(Debug, Clone)]
pub struct S3Credentials {
    /// Its public part.
    pub key_id: String,
    /// Its secret part.
    pub secret: Secret<String>,
    /// What goes with a key that is lent for a time.
    pub session_token: Option<Secret<String>>,
}

/// Bounds of one call.
#[derive(Debug, Clone, Copy)]
pub struct S3Patience {
    /// For a connection.
    pub connect: Duration,
    /// For one request with its body; a part of an upload is one request.
    pub request: Duration,
    /// Repetitions after the first try.
    pub retries_max: usize,
    /// No repetition begins later than this after the first try.
    pub retry_for: Duration,
}

impl Default for S3Patience {
    fn default() -> S3Patience {
        S3Patience {
            connect: Duration::from_secs(5),
            request: Duration::from_secs(60),
            retries_max: 5,
            retry_for: Duration::from_secs(90),
        }
    }
}

/// Why a bucket cannot be used at all.
#[derive(Debug, thiserror::Error)]
pub enum S3StoreError {
    /// The thread of its connections could not be started.
    #[error("open blob store {name}: start its thread")]
    Thread {
        /// The store.
        name: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The endpoint is no address.
    #[error("open blob store {name}: endpoint {endpoint:?} is no http:// or https:// address")]
    Endpoint {
        /// The store.
        name: String,
        /// What was given.
        endpoint: String,
    },
    /// The bucket's name, prefix, endpoint or credentials are not what they must be.
    #[error("open blob store {name}: check bucket, prefix, endpoint and credentials")]
    Options {
        /// The store.
        name: String,
        /// What the client library says.
        #[source]
        source: Box<object_store::Error>,
    },
}

/// A bucket of blobs.
#[derive(Debug)]
pub struct S3Store {
    name: String,
    prefix: Path,
    client: AmazonS3,
    /// `None` only while it is dropped.
    runtime: Option<Runtime>,
}

impl S3Store {
    /// Prepares the client. Nothing is sent: a wrong address shows with the first call.
    ///
    /// # Errors
    /// [`S3StoreError`].
    pub fn open(options: &S3Options) -> Result<S3Store, S3StoreError> {
        let name = match options.prefix.trim_matches('/') {
            "" => format!("s3://{}", options.bucket),
            prefix => format!("s3://{}/{prefix}", options.bucket),
        };
        if let Some(endpoint) = &options.endpoint {
            // The client library would panic at the first request.
            let is_address = reqwest::Url::parse(endpoint)
                .is_ok_and(|url| matches!(url.scheme(), "http" | "https") && url.has_host());
            if !is_address {
                return Err(S3StoreError::Endpoint { name, endpoint: endpoint.clone() });
            }
        }
        let refused = |source: object_store::Error| S3StoreError::Options {
            name: name.clone(),
            source: Box::new(source),
        };
        let prefix =
            Path::parse(options.prefix.trim_matches('/')).map_err(|e| refused(e.into()))?;
        let client = builder(options).build().map_err(refused)?;
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("blobs-s3")
            .enable_all()
            .build()
            .map_err(|source| S3StoreError::Thread { name: name.clone(), source })?;
        Ok(S3Store { name, prefix, client, runtime: Some(runtime) })
    }

    fn wait<T>(
        &self,
        action: BlobAction,
        key: &BlobKey,
        call: impl Future<Output = Result<T, object_store::Error>>,
    ) -> Result<T, BlobError> {
        let runtime = self.runtime.as_ref().expect("it is taken only while the store is dropped");
        runtime.block_on(call).map_err(|e| self.error(action, key, fault(e)))
    }

    fn error(&self, action: BlobAction, key: &BlobKey, fault: BlobFault) -> BlobError {
        BlobError { action, key: key.as_str().to_owned(), store: self.name.clone(), fault }
    }

    fn path(&self, key: &BlobKey) -> Path {
        // The characters of a key are all plain in S3 too: `parse` would change none of them.
        Path::from_iter(self.prefix.parts().chain(key.as_str().split('/').map(Into::into)))
    }

    /// What follows the prefix, if it is a key.
    fn key(&self, path: &Path) -> Option<BlobKey> {
        let rest: Vec<_> = path.prefix_match(&self.prefix)?.collect();
        let rest: Vec<&str> = rest.iter().map(AsRef::as_ref).collect();
        BlobKey::new(rest.join("/")).ok()
    }

    fn check_length(&self, key: &BlobKey, bytes: u64, max_bytes: u64) -> Result<(), BlobError> {
        if bytes > max_bytes {
            let fault = BlobFault::TooLong { bytes, max_bytes };
            return Err(self.error(BlobAction::Write, key, fault));
        }
        Ok(())
    }

    async fn put_in_parts(&self, path: &Path, body: Bytes) -> Result<(), object_store::Error> {
        let upload = self.client.put_multipart(path).await?;
        let mut parts = WriteMultipart::new_with_chunk_size(upload, PART_BYTES);
        for at in (0..body.len()).step_by(PART_BYTES) {
            parts.wait_for_capacity(PARTS_AT_ONCE).await?;
            parts.put(body.slice(at..(at + PART_BYTES).min(body.len())));
        }
        parts.finish().await.map(|_written| ())
    }
}

fn builder(options: &S3Options) -> AmazonS3Builder {
    let patience = options.patience;
    let mut builder = AmazonS3Builder::new()
        .with_bucket_name(&options.bucket)
        .with_http_connector(Connector { patience })
        .with_conditional_put(S3ConditionalPut::ETagMatch)
        .with_retry(RetryConfig {
            backoff: BackoffConfig {
                init_backoff: Duration::from_millis(50),
                max_backoff: Duration::from_secs(5),
                base: 2.0,
            },
            max_retries: patience.retries_max,
            retry_timeout: patience.retry_for,
        });
    if let Some(region) = &options.region {
        builder = builder.with_region(region);
    }
    if let Some(endpoint) = &options.endpoint {
        // Whether it is plain HTTP is the endpoint's word; the operator wrote it.
        builder = builder.with_endpoint(endpoint).with_allow_http(true);
    }
    if let Some(S3Credentials { key_id, secret, session_token }) = &options.credentials {
        builder = builder.with_access_key_id(key_id).with_secret_access_key(secret.expose());
        if let Some(token) = session_token {
            builder = builder.with_token(token.expose());
        }
    }
    builder
}

/// The library's errors in the words of every store. Those that name no class carry an answer of the
/// server or a lost connection, after all repetitions.
fn fault(e: object_store::Error) -> BlobFault {
    use object_store::Error;
    match e {
        Error::NotFound { .. } => BlobFault::NotFound,
        Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => {
            BlobFault::Denied(Arc::new(e))
        }
        // 507 and the code of servers whose disk is full: the library has no class for them.
        other if says_full(&other) => BlobFault::Full(Arc::new(other)),
        other => BlobFault::Unavailable(Arc::new(other)),
    }
}

fn says_full(e: &object_store::Error) -> bool {
    let text = e.to_string();
    ["507 Insufficient Storage", "XMinioStorageFull", "QuotaExceeded"]
        .iter()
        .any(|each| text.contains(each))
}

fn stat_of(meta: &ObjectMeta) -> BlobStat {
    BlobStat { bytes: meta.size, modified: UnixMillis(meta.last_modified.timestamp_millis()) }
}

impl BlobStore for S3Store {
    fn name(&self) -> &str {
        &self.name
    }

    fn put(&self, key: &BlobKey, body: Bytes) -> Result<(), BlobError> {
        self.check_length(key, body.len() as u64, BLOB_BYTES_MAX)?;
        let path = self.path(key);
        self.wait(BlobAction::Write, key, async {
            if body.len() > PART_BYTES {
                return self.put_in_parts(&path, body).await;
            }
            self.client.put(&path, PutPayload::from(body)).await.map(|_written| ())
        })
    }

    fn create(&self, key: &BlobKey, body: Bytes) -> Result<Created, BlobError> {
        self.check_length(key, body.len() as u64, CREATE_BYTES_MAX)?;
        let path = self.path(key);
        let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
        self.wait(BlobAction::Write, key, async {
            match self.client.put_opts(&path, PutPayload::from(body), options).await {
                Err(object_store::Error::AlreadyExists { .. }) => Ok(Created::WasThere),
                other => other.map(|_written| Created::Yes),
            }
        })
    }

    fn get(&self, key: &BlobKey, max_bytes: u64) -> Result<Bytes, BlobError> {
        let path = self.path(key);
        let read = self.wait(BlobAction::Read, key, async {
            let answer = self.client.get(&path).await?;
            // Known before the body is read, so that no long one is ever taken in.
            if answer.meta.size > max_bytes {
                return Ok(None);
            }
            answer.bytes().await.map(Some)
        })?;
        read.ok_or_else(|| {
            let what = format!("it is longer than the {max_bytes} bytes it may have");
            self.error(BlobAction::Read, key, BlobFault::Corrupt { what })
        })
    }

    fn get_range(&self, key: &BlobKey, range: Range<u64>) -> Result<Bytes, BlobError> {
        let bytes = range.end.saturating_sub(range.start);
        if bytes > BLOB_BYTES_MAX {
            let fault = BlobFault::TooLong { bytes, max_bytes: BLOB_BYTES_MAX };
            return Err(self.error(BlobAction::Read, key, fault));
        }
        let path = self.path(key);
        let read = self.wait(BlobAction::Read, key, self.client.get_range(&path, range.clone()));
        let short = |length: u64| {
            let what = format!("it has {length} bytes, and should have {} or more", range.end);
            self.error(BlobAction::Read, key, BlobFault::Corrupt { what })
        };
        match read {
            Ok(body) if body.len() as u64 == bytes => Ok(body),
            Ok(body) => Err(short(range.start.saturating_add(body.len() as u64))),
            Err(e) if e.is_not_found() => Err(e),
            // A range past the end is refused with an error that has no class of its own.
            Err(e) => match self.stat(key) {
                Ok(stat) if stat.bytes < range.end => Err(short(stat.bytes)),
                _ => Err(e),
            },
        }
    }

    fn stat(&self, key: &BlobKey) -> Result<BlobStat, BlobError> {
        let path = self.path(key);
        self.wait(BlobAction::Stat, key, self.client.head(&path)).map(|meta| stat_of(&meta))
    }

    fn list(&self, folder: &BlobKey) -> Result<Vec<(BlobKey, BlobStat)>, BlobError> {
        let path = self.path(folder);
        let listed = self.client.list(Some(&path)).try_collect::<Vec<_>>();
        let found = self.wait(BlobAction::List, folder, listed)?;
        Ok(found
            .iter()
            .filter_map(|each| Some((self.key(&each.location)?, stat_of(each))))
            .collect())
    }

    fn delete(&self, key: &BlobKey) -> Result<(), BlobError> {
        let path = self.path(key);
        match self.wait(BlobAction::Delete, key, self.client.delete(&path)) {
            Err(e) if !e.is_not_found() => Err(e),
            _ => Ok(()),
        }
    }
}

impl Drop for S3Store {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // Every call has returned, so all that runs are idle connections; and this may be
            // an async task's thread, where waiting for them would panic.
            runtime.shutdown_background();
        }
    }
}
