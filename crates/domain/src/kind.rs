//! What a caller should do about an error: coarse, prescriptive, one list for the whole system.

/// The kind of an error. Each protocol has one table from kinds to its codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Fix the request.
    Invalid,
    /// Say who you are.
    Unauthenticated,
    /// You may not.
    Forbidden,
    /// It is not there; stop.
    NotFound,
    /// Look at the state, then decide.
    Conflict,
    /// Free something, or wait.
    Quota,
    /// Try again with backoff.
    Unavailable,
    /// It took too long; try again with backoff.
    Timeout,
    /// The caller left.
    Cancelled,
    /// A defect; report it.
    Internal,
}
