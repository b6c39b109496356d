//! PEM (RFC 7468), strictly: what is not a block is counted, never guessed at.
