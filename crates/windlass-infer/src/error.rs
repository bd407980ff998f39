//! What can go wrong in generation through the user's choices or the model's output.

/// An error of this crate; the message names the flag or the token at fault.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum InferError {
    /// A sampling or stop setting lies outside its range.
    #[error("--{flag} {value}: must be {rule}")]
    Setting {
        /// The command line's name of the setting, without dashes.
        flag: &'static str,
        /// The value that was given.
        value: String,
        /// The range, as the end of the sentence "must be …".
        rule: &'static str,
        /// What to give instead.
        hint: &'static str,
    },
    /// A logit is NaN or +∞: no distribution exists.
    #[error("the model gave the logit {value} to token {token}")]
    BadLogit {
        /// The token id.
        token: u32,
        /// NaN or +∞.
        value: f32,
    },
    /// Every logit is −∞: no token is allowed.
    #[error("no token can be chosen: all {vocabulary} logits are -inf")]
    NoToken {
        /// The number of logits.
        vocabulary: usize,
    },
}

impl InferError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Setting { hint, .. } => Some((*hint).to_owned()),
            Self::BadLogit { .. } => Some(
                "the weights are damaged or the training has diverged: try an earlier checkpoint"
                    .to_owned(),
            ),
            Self::NoToken { .. } => None,
        }
    }
}
