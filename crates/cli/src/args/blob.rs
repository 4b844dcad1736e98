//! `belljar blob`: the store of images.

use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Subcommand};

/// `belljar blob`.
#[derive(Debug, Clone, Args)]
pub(crate) struct Blob {
    /// The store: a folder, or `s3://bucket/prefix` [default: blobs in the data folder].
    ///
    /// S3 takes AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION and, for servers that
    /// are not Amazon's, AWS_ENDPOINT_URL_S3.
    #[arg(long, global = true, env = "BELLJAR_BLOBS", value_name = "DIR|s3://…")]
    pub(crate) blobs: Option<BlobPlace>,
    #[command(subcommand)]
    pub(crate) command: BlobCommand,
}

#[derive(Debug, Clone, Subcommand)]
pub(crate) enum BlobCommand {
    /// Read and check everything in the store; damage is listed, and nothing is changed.
    Verify,
    /// Collect what no ref reaches. Safe beside running servers.
    ///
    /// What is found unreachable is marked first, and deleted by a collection after the grace.
    Gc {
        /// How long unreachable data is kept before it is marked, and again before it is deleted; at least 10 minutes.
        #[arg(long, default_value_t = 360, value_name = "MINUTES", value_parser = clap::value_parser!(u32).range(10..))]
        grace_minutes: u32,
    },
    /// Count images and objects, and what sharing and compression save.
    Stats,
}

/// Where a store is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum BlobPlace {
    /// A folder of this host.
    Dir(PathBuf),
    /// A folder of a bucket.
    S3 { bucket: String, prefix: String },
}

impl FromStr for BlobPlace {
    type Err = String;

    fn from_str(text: &str) -> Result<BlobPlace, String> {
        if let Some(rest) = text.strip_prefix("s3://") {
            let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
            if bucket.is_empty() {
                return Err(
                    "it names no bucket: write s3://BUCKET or s3://BUCKET/PREFIX".to_owned()
                );
            }
            let prefix = prefix.trim_matches('/').to_owned();
            return Ok(BlobPlace::S3 { bucket: bucket.to_owned(), prefix });
        }
        if text.is_empty() || text.contains("://") {
            return Err("it is neither a folder nor s3://BUCKET/PREFIX".to_owned());
        }
        Ok(BlobPlace::Dir(PathBuf::from(text)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_a_folder_or_a_bucket() {
        let s3 = |bucket: &str, prefix: &str| {
            Ok(BlobPlace::S3 { bucket: bucket.to_owned(), prefix: prefix.to_owned() })
        };
        assert_eq!("s3://b".parse(), s3("b", ""));
        assert_eq!("s3://b/x/y/".parse(), s3("b", "x/y"));
        assert_eq!("a/b".parse(), Ok(BlobPlace::Dir("a/b".into())));
        for bad in ["", "s3://", "s3:///x", "gs://b", "http://b/c"] {
            assert!(bad.parse::<BlobPlace>().is_err(), "{bad:?}");
        }
    }
}
