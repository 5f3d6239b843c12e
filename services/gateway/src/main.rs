//! See the library.

fn main() -> std::process::ExitCode {
    runtime::main::<gateway::Settings>()
}
