//! A real browser: headless Chromium, driven by its chromedriver (W3C WebDriver over HTTP).

use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::{Scratch, eventually, http, repository};

/// A browser with one tab.
pub struct Browser {
    driver: Child,
    address: String,
    session: String,
}

impl Browser {
    /// Starts a browser that writes all its files to `scratch`.
    ///
    /// # Panics
    /// If there is no chromedriver.
    pub async fn start(scratch: &Scratch) -> Self {
        let log = scratch.path("chromedriver.log");
        let driver = Command::new("chromedriver")
            .args(["--port=0", "--log-level=WARNING"])
            .stdout(std::fs::File::create(&log).unwrap())
            .stderr(Stdio::null())
            // The browser is a child of the driver. `drop` kills both as a group.
            .process_group(0)
            .spawn()
            .expect("chromedriver and Chromium (apt-get install chromium chromium-driver)");
        let mut browser = Self { driver, address: String::new(), session: String::new() };
        eventually("the driver listens", async || {
            let said = std::fs::read_to_string(&log).unwrap();
            let port = said.split("successfully on port ").nth(1);
            let port = port.and_then(|rest| rest.split('.').next());
            browser.address = format!("127.0.0.1:{}", port.unwrap_or_default());
            port.is_some()
        })
        .await;
        let profile = format!("--user-data-dir={}", scratch.path("browser").display());
        let options = json!({ "args": [
            "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", profile,
        ] });
        let capabilities = json!({ "capabilities": { "alwaysMatch": {
            "goog:chromeOptions": options,
            "goog:loggingPrefs": { "browser": "ALL" },
        } } });
        let answer = http::post(&browser.address, "/session", &capabilities).await;
        let session = answer.json()["value"]["sessionId"].as_str().map(str::to_owned);
        browser.session = session.unwrap_or_else(|| panic!("no session: {answer:?}"));
        browser
    }

    async fn command(&self, name: &str, body: Value) -> Value {
        let path = format!("/session/{}/{name}", self.session);
        let answer = http::post(&self.address, &path, &body).await;
        assert_eq!(answer.status, 200, "{name} {body}: {}", answer.body);
        answer.json()["value"].take()
    }

    /// Opens a page.
    pub async fn open(&self, url: &str) {
        self.command("url", json!({ "url": url })).await;
    }

    /// The value of an expression.
    pub async fn value(&self, expression: &str) -> Value {
        let script = format!("return {expression}");
        self.command("execute/sync", json!({ "script": script, "args": [] })).await
    }

    /// The text of the elements that a selector finds.
    pub async fn texts(&self, selector: &str) -> Vec<String> {
        let all = format!("[...document.querySelectorAll({selector:?})].map(e => e.innerText)");
        let texts = self.value(&all).await;
        texts.as_array().unwrap().iter().map(|text| text.as_str().unwrap().to_owned()).collect()
    }

    /// The text of the first element that a selector finds.
    pub async fn text(&self, selector: &str) -> String {
        self.texts(selector).await.into_iter().next().unwrap_or_default()
    }

    /// Types into the element that has the focus. `\u{E007}` is Enter, `\u{E004}` Tab.
    pub async fn press(&self, keys: &str) {
        let presses = keys.chars().flat_map(|key| {
            [json!({ "type": "keyDown", "value": key }), json!({ "type": "keyUp", "value": key })]
        });
        let actions: Vec<_> = presses.collect();
        let keyboard = json!({ "type": "key", "id": "keyboard", "actions": actions });
        self.command("actions", json!({ "actions": [keyboard] })).await;
    }

    /// Sends a command of the `DevTools` protocol, such as the emulation of a phone.
    pub async fn devtools(&self, command: &str, parameters: Value) {
        let body = json!({ "cmd": command, "params": parameters });
        self.command("goog/cdp/execute", body).await;
    }

    /// All warnings and errors of the browser, such as a script that failed or content that the
    /// page's policy forbids.
    pub async fn complaints(&self) -> Vec<String> {
        let entries = self.command("se/log", json!({ "type": "browser" })).await;
        entries.as_array().unwrap().iter().map(ToString::to_string).collect()
    }

    /// Saves a screenshot of the page in `target/screenshots`.
    pub async fn screenshot(&self, name: &str) {
        use base64::Engine;
        let body =
            json!({ "cmd": "Page.captureScreenshot", "params": { "captureBeyondViewport": true } });
        let picture = self.command("goog/cdp/execute", body).await["data"].take();
        let engine = base64::engine::general_purpose::STANDARD;
        let picture = engine.decode(picture.as_str().unwrap()).unwrap();
        let directory = repository().join("target/screenshots");
        std::fs::create_dir_all(&directory).unwrap();
        std::fs::write(directory.join(format!("{name}.png")), picture).unwrap();
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let group = Pid::from_raw(self.driver.id().cast_signed());
        let _ = killpg(group, Signal::SIGKILL);
        let _ = self.driver.wait();
    }
}
