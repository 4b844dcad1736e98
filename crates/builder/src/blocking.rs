//! File work off the async threads.

/// Runs blocking file work on its own thread.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(e) => match e.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // Blocking tasks are only cancelled by a runtime that shuts down, which drops this too.
            Err(_) => std::future::pending().await,
        },
    }
}
