//! End-to-end tests: one binary, a module a subject.

#![allow(clippy::unwrap_used)]

mod gateway;
mod generator;
mod install;
mod multiplier;
mod outages;
mod process;
mod provisioning;
mod up;
