//! Memory that is not returned to the system between steps.
