//! Parameters at rest: file codecs, checkpoints, and where parameters live.
