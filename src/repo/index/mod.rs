//! Index: which digest lies where.
//!
//! Every writer leaves one index file ([`format`]) that is complete before a manifest refers to what it lists; a
//! repository is the union of its index files ([`set`]). Files are never changed: when there are many, the small ones are
//! merged into a new one and removed after that is durable ([`merge`]). A reader keeps the files that it has open, also
//! removed ones, and every pack that they name is still there. A damaged one costs nothing but time: packs say all that it
//! did ([`heal`]).

pub mod format;
pub mod heal;
mod kept;
pub mod merge;
pub mod set;

#[cfg(test)]
mod tests;
