//! "Not measured" is never zero.

/// What reading one quantity gave. A measured zero is `Value(0)`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub enum Reading<T> {
    /// It was measured.
    Value(T),
    /// Nobody tried in this window.
    #[default]
    NotMeasured,
    /// This device, driver or kernel cannot tell.
    Unsupported,
    /// It was tried and failed, for the reason given.
    Failed(String),
}

impl<T> Reading<T> {
    /// The value, if there is one.
    #[must_use]
    pub fn value(&self) -> Option<&T> {
        match self {
            Self::Value(value) => Some(value),
            Self::NotMeasured | Self::Unsupported | Self::Failed(_) => None,
        }
    }

    /// The same reading of a quantity derived from this one.
    #[must_use]
    pub fn map<U>(self, f: impl FnOnce(T) -> U) -> Reading<U> {
        match self {
            Self::Value(value) => Reading::Value(f(value)),
            Self::NotMeasured => Reading::NotMeasured,
            Self::Unsupported => Reading::Unsupported,
            Self::Failed(why) => Reading::Failed(why),
        }
    }
}
