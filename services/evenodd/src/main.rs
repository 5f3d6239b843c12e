//! See the library.

fn main() -> std::process::ExitCode {
    evenodd::main()
}
