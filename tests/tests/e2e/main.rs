//! End-to-end tests: one binary, a module a subject.

#![allow(clippy::unwrap_used)]

mod generator;
