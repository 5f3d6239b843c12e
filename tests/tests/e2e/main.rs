//! End-to-end tests in one binary, with a module for each subject.

#![allow(clippy::disallowed_types, clippy::unwrap_used)]

mod access;
mod api;
mod checkout;
mod clocks;
mod cluster;
mod gateway;
mod generator;
mod history;
mod install;
mod keys;
mod live;
mod multiplier;
mod numbers;
mod outages;
mod page;
mod printing;
mod process;
mod provisioning;
mod replicas;
mod takeover;
mod up;
mod verify;
