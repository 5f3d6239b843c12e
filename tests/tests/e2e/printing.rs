//! What commands print: on a closed or full standard output, and in colour.

use std::fs;

use tests::{Broker, Process, Scratch, binaries};

/// Runs a shell command in the directory of the binaries, and returns its status and output.
async fn shell(scratch: &Scratch, command: &str) -> (Option<i32>, String) {
    let command = format!("cd {} && {command}", binaries().display());
    let command = ["sh", "-c", &command].map(str::to_owned).into();
    let mut process = Process::start_command(scratch, "sh", command);
    (process.wait().await.code(), process.log())
}

#[tokio::test]
async fn a_closed_or_full_standard_output_is_one_line_and_status_1() {
    let scratch = Scratch::new();
    let broker = Broker::start(&scratch).await;
    let nats = broker.url();
    let health = format!("{}.1:18081", tests::network());
    let args = ["--parity", "even", "--nats", &nats, "--health", &health];
    let mut generator = Process::start(&scratch, "generator", &args);
    generator.wait_for("connected to NATS").await;
    fs::write(scratch.path("key"), "0123456789abcdef0123456789abcdef").unwrap();
    let path = |name: &str| scratch.path(name).to_str().unwrap().to_owned();
    let (key, keys) = (path("key"), path("keys"));
    for command in [
        format!("./evenodd token --secret {key}"),
        format!("./evenodd keys --directory {keys}"),
        format!("./evenodd provision --nats {nats}"),
        format!("./evenodd verify --nats {nats}"),
        format!("./generator --parity even --health {health} healthcheck"),
    ] {
        // A subshell that has ended is a closed pipe.
        let closed = format!("( sleep 0.2; {command}; echo $? >&2 ) | true");
        for (command, status) in [(format!("{command} >/dev/full"), Some(1)), (closed, Some(0))] {
            let (exit, output) = shell(&scratch, &command).await;
            assert_eq!(exit, status, "{command}: {output}");
            let lines: Vec<_> = output.lines().collect();
            let expected = if status == Some(1) { 1 } else { 2 };
            assert_eq!(lines.len(), expected, "{command}: {output}");
            assert!(lines[0].contains("cannot write to standard output"), "{command}: {output}");
            assert!(expected == 1 || lines[1] == "1", "{command}: {output}");
        }
    }
    // What was to be done is done all the same.
    let (_, output) = shell(&scratch, &format!("./evenodd provision --nats {nats}")).await;
    assert_eq!(output.matches("as it must be").count(), 2, "{output}");
}

#[tokio::test]
async fn colours_are_for_terminals_and_no_color_turns_them_off() {
    let scratch = Scratch::new();
    for (variable, is_coloured) in [("NO_COLOR=1", false), ("NO_COLOR=", true)] {
        // `script` runs a command on a terminal of its own.
        let generator = "timeout 1 ./generator --parity even --nats nats://127.0.0.1:9";
        let command =
            format!("{variable} script --quiet --return --command '{generator}' /dev/null");
        let (status, output) = shell(&scratch, &command).await;
        if status == Some(127) {
            eprintln!("skipped: there is no program `script` here");
            return;
        }
        assert!(output.contains("answering requests"), "{output}");
        assert_eq!(output.contains("\x1b["), is_coloured, "{variable}: {output:?}");
    }
}

#[tokio::test]
async fn evenodd_alone_prints_its_commands() {
    let scratch = Scratch::new();
    for variable in ["", "EVENODD_LOG=info "] {
        let (status, output) = shell(&scratch, &format!("{variable}./evenodd")).await;
        assert_eq!(status, Some(2), "{output}");
        for command in ["up", "provision", "keys", "takeover", "verify", "token"] {
            assert!(output.contains(command), "{output}");
        }
    }
}
