//! The instant as a parameter: adapters are handed a [`Clock`], tests hand them one that they move.

use std::sync::Arc;

use jiff::Timestamp;

/// Tells the present instant. The real one comes from `runtime::clock::system()`.
#[derive(Clone)]
pub struct Clock(Arc<dyn Fn() -> Timestamp + Send + Sync>);

impl Clock {
    /// A clock that asks `tell` each time.
    pub fn new(tell: impl Fn() -> Timestamp + Send + Sync + 'static) -> Self {
        Self(Arc::new(tell))
    }

    /// The present instant, as this clock tells it.
    pub fn now(&self) -> Timestamp {
        (self.0)()
    }
}
