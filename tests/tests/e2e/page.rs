//! The page, in a real browser: `make test-page`.

use contract::{Parity, subjects};
use serde_json::json;
use tests::browser::Browser;
use tests::http::get;
use tests::{Pipeline, Process, eventually};

/// A running pipeline, a browser, and the page in it.
struct Shown {
    browser: Browser,
    address: String,
    gateway: Process,
    others: Vec<Process>,
    pipeline: Pipeline,
}

impl Shown {
    async fn new(args: &[&str]) -> Self {
        let pipeline = Pipeline::new().await;
        let (gateway, address) = pipeline.gateway_with(args).await;
        let mut others: Vec<_> = pipeline.generators().await.into();
        others.push(pipeline.multiplier(100).await);
        others.push(pipeline.multiplier(100).await);
        eventually("the gateway knows everything", async || {
            get(&address, "/replicas", &[]).await.status != 503
        })
        .await;
        let browser = Browser::start(&pipeline.scratch).await;
        browser.open(&format!("http://{address}/")).await;
        Self { browser, address, gateway, others, pipeline }
    }

    async fn state(&self) -> String {
        self.browser.text("#status").await
    }

    async fn is_live(&self) {
        eventually("the page is live", async || self.state().await == "live").await;
    }

    /// The sequences in the list, newest first.
    async fn sequences(&self) -> Vec<u64> {
        let texts = self.browser.texts("#list td:last-child").await;
        texts.iter().map(|text| text.replace(',', "").parse().unwrap()).collect()
    }

    /// Waits until the page shows records after this sequence. None may be missing.
    async fn goes_on_after(&self, seq: u64) -> u64 {
        eventually("the page goes on", async || {
            self.sequences().await.first().is_some_and(|latest| *latest > seq + 5)
        })
        .await;
        let shown = self.sequences().await;
        let latest = shown[0];
        let expected: Vec<u64> = (1..=latest).rev().take(100).collect();
        assert_eq!(shown, expected);
        latest
    }

    async fn alive(&self, service: &str) -> String {
        let selector = format!("document.querySelector('[data-service={service}]')?.dataset.alive");
        self.browser.value(&selector).await.as_str().unwrap_or_default().to_owned()
    }
}

#[tokio::test]
#[ignore = "needs a browser: make test-page"]
async fn records_are_shown_as_they_come() {
    let shown = Shown::new(&[]).await;
    shown.is_live().await;
    let latest = shown.goes_on_after(100).await;
    shown.goes_on_after(latest).await;
    // The page shows what the gateway answers.
    let script = "[...document.querySelectorAll('#list tr')].map(row => [...row.cells].map(c => c.innerText))";
    let rows = shown.browser.value(script).await;
    let numbers = get(&shown.address, "/history?limit=1000", &[]).await.json();
    for row in rows.as_array().unwrap() {
        let field = |at: usize| row[at].as_str().unwrap().replace(',', "");
        let seq: usize = field(3).parse().unwrap();
        let number = &numbers["numbers"][seq - 1];
        assert_eq!(field(0), format!("{} × {}", number["even"], number["odd"]));
        assert_eq!(field(1), number["number"].to_string());
    }
    assert_eq!(shown.browser.value("document.querySelectorAll('#chart rect').length").await, 100);
    assert_eq!(shown.browser.text("#expected").await, "80");
    // The page counts more than the last 100.
    let rate: u32 = shown.browser.text("#rate").await.parse().unwrap();
    assert!(rate > 100, "only {rate}");
    eventually("all replicas are shown", async || {
        let mut counts = Vec::new();
        for service in ["even", "odd", "multiplier", "gateway"] {
            counts.push(shown.alive(service).await);
        }
        counts == ["2", "2", "2", "1"]
    })
    .await;
    eventually("a multiplier did the latest tick", async || {
        shown.browser.text("[data-service=multiplier] .ticked").await.contains("latest tick")
    })
    .await;
    // The page opens only one event stream.
    let count = "performance.getEntriesByType('resource').filter(e => e.name.includes('/numbers/live')).length";
    let streams = shown.browser.value(count).await;
    assert!(streams.as_u64().unwrap() <= 1, "{streams}");
    let complaints = shown.browser.complaints().await;
    assert!(complaints.is_empty(), "{complaints:?}");
}

#[tokio::test]
#[ignore = "needs a browser: make test-page"]
async fn the_page_recovers_from_a_killed_or_frozen_gateway() {
    let mut shown = Shown::new(&[]).await;
    shown.is_live().await;
    let before = shown.goes_on_after(0).await;
    shown.gateway.kill();
    eventually("it says so", async || shown.state().await.starts_with("disconnected")).await;
    shown.browser.screenshot("disconnected").await;
    // Products are published meanwhile.
    let published = async || shown.pipeline.entries(before + 20, 1).await.len();
    eventually("numbers are published", async || published().await == 1).await;
    let (url, address) = (shown.pipeline.broker.url(), shown.address.clone());
    let args = ["--nats", &url, "--http", &address];
    shown.gateway = Process::start(&shown.pipeline.scratch, "gateway", &args);
    shown.is_live().await;
    shown.goes_on_after(before + 20).await;
    // The page also notices a frozen gateway, and its return.
    shown.gateway.signal(nix::sys::signal::Signal::SIGSTOP);
    let frozen = std::time::Instant::now();
    eventually("it says so", async || shown.state().await.starts_with("disconnected")).await;
    assert!(frozen.elapsed() < tests::patient(std::time::Duration::from_secs(4)));
    shown.gateway.signal(nix::sys::signal::Signal::SIGCONT);
    shown.is_live().await;
    shown.goes_on_after(before + 30).await;
}

#[tokio::test]
#[ignore = "needs a browser: make test-page"]
async fn a_lost_replica_and_a_lost_broker_are_shown() {
    let mut shown = Shown::new(&[]).await;
    shown.is_live().await;
    eventually("both are there", async || shown.alive("even").await == "2").await;
    shown.others[0].kill();
    eventually("one is lost", async || {
        shown.alive("even").await == "1"
            && shown.browser.text("[data-service=even] .lost").await.contains("lost")
    })
    .await;
    shown.browser.screenshot("lost-replica").await;
    shown.pipeline.broker.kill();
    eventually("it is stale", async || shown.state().await.starts_with("stale")).await;
    shown.pipeline.broker.restart().await;
    shown.is_live().await;
    let before = shown.sequences().await[0];
    shown.goes_on_after(before).await;
}

#[tokio::test]
#[ignore = "needs a browser: make test-page"]
async fn the_page_asks_for_a_token_if_one_is_needed() {
    let scratch = tests::Scratch::new();
    let key = scratch.path("key");
    std::fs::write(&key, "0123456789abcdef0123456789abcdef").unwrap();
    let key = key.to_str().unwrap();
    let shown = Shown::new(&["--jwt-secret", key]).await;
    eventually("the page asks for a token", async || shown.state().await == "a token is needed")
        .await;
    shown.browser.value("document.getElementById('token').focus()").await;
    shown.browser.press("wrong\u{E007}").await;
    eventually("the token is refused", async || {
        shown.browser.text("#refused").await.contains("not accepted")
    })
    .await;
    shown.browser.screenshot("token").await;
    let mut token = Process::start(&scratch, "evenodd", &["token", "--secret", key]);
    assert!(token.wait().await.success());
    shown.browser.value("document.getElementById('token').value = ''").await;
    shown.browser.value("document.getElementById('token').focus()").await;
    shown.browser.press(&format!("{}\u{E007}", token.log().trim())).await;
    shown.is_live().await;
    shown.goes_on_after(0).await;
    // The tab remembers the token.
    shown.browser.open(&format!("http://{}/", shown.address)).await;
    shown.is_live().await;
    eventually("the replicas are shown", async || shown.alive("odd").await == "2").await;
}

#[tokio::test]
#[ignore = "needs a browser: make test-page"]
async fn the_page_fits_a_phone_dark_mode_and_a_keyboard() {
    let shown = Shown::new(&[]).await;
    shown.is_live().await;
    shown.goes_on_after(100).await;
    for (size, width, height) in [("small", 320, 640), ("phone", 390, 844), ("desk", 1200, 1400)] {
        let metrics = json!({
            "width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500,
        });
        shown.browser.devtools("Emulation.setDeviceMetricsOverride", metrics).await;
        for theme in ["light", "dark"] {
            let feature = json!({ "name": "prefers-color-scheme", "value": theme });
            let media = json!({ "features": [feature] });
            shown.browser.devtools("Emulation.setEmulatedMedia", media).await;
            for page in ["", "docs"] {
                shown.browser.open(&format!("http://{}/{page}", shown.address)).await;
                let loaded = "document.querySelectorAll('#list tr').length + document.querySelectorAll('.route').length";
                eventually("it is loaded", async || {
                    shown.browser.value(loaded).await.as_u64() > Some(7)
                })
                .await;
                let wide = "document.documentElement.scrollWidth > innerWidth";
                assert_eq!(
                    shown.browser.value(wide).await,
                    false,
                    "{page} on a {size} is too wide"
                );
                let cut = "[...document.querySelectorAll('th, td')].filter(cell => cell.scrollWidth \
                    > cell.clientWidth || cell.getBoundingClientRect().right > innerWidth).length";
                assert_eq!(shown.browser.value(cut).await, 0, "{page} on a {size} cuts cells");
                let rows = "new Set([...document.querySelectorAll('.latest dd')] \
                    .map(figure => figure.offsetTop)).size";
                assert!(shown.browser.value(rows).await.as_u64() <= Some(1), "{size}");
                let name = if page.is_empty() { "page" } else { page };
                if page.is_empty() {
                    eventually("the replicas are shown", async || shown.alive("odd").await == "2")
                        .await;
                    shown.is_live().await;
                }
                shown.browser.screenshot(&format!("{name}-{size}-{theme}")).await;
                let back =
                    shown.browser.value("getComputedStyle(document.body).backgroundColor").await;
                let is_dark = back.as_str().unwrap().contains("16, 20, 27");
                assert_eq!(is_dark, theme == "dark", "{back}");
            }
        }
    }
    // By keyboard: the first element is the link that skips to the list.
    shown.browser.open(&format!("http://{}/", shown.address)).await;
    shown.is_live().await;
    shown.browser.press("\u{E004}").await;
    let focus = shown.browser.value("document.activeElement.innerText").await;
    assert_eq!(focus, "Skip to the list of numbers");
    // For screen readers: the state is spoken, the chart is described, the table has headings.
    let roles = "[document.getElementById('status').role, document.querySelectorAll('th[scope=col]').length]";
    assert_eq!(shown.browser.value(roles).await, json!(["status", 4]));
    let chart =
        shown.browser.value("document.getElementById('chart').getAttribute('aria-label')").await;
    assert!(chart.as_str().unwrap().starts_with("100 numbers, from "), "{chart}");
}

#[tokio::test]
#[ignore = "needs a browser: make test-page"]
async fn nothing_moves() {
    let shown = Shown::new(&[]).await;
    for (width, height, mobile) in [(390, 844, true), (1200, 1400, false)] {
        let metrics = json!({
            "width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile,
        });
        shown.browser.devtools("Emulation.setDeviceMetricsOverride", metrics).await;
        for page in ["docs", ""] {
            shown.browser.open(&format!("http://{}/{page}", shown.address)).await;
            // With everything that has moved since the page was opened.
            let observe = "(window.moved = [], new PerformanceObserver(list => moved.push( \
                ...list.getEntries().map(({ value }) => value).filter(value => value > 0.001))) \
                .observe({ type: 'layout-shift', buffered: true }))";
            shown.browser.value(observe).await;
            if page.is_empty() {
                shown.is_live().await;
                // The tick goes from one multiplier to the other and back.
                for at in [1, 2, 1] {
                    let ticked = format!("[data-service=multiplier] li:nth-child({at}).ticked");
                    eventually("this one draws the tick", async || {
                        shown.browser.text(&ticked).await.contains("latest tick")
                    })
                    .await;
                }
                shown.goes_on_after(100).await;
            } else {
                eventually("it is shown", async || shown.browser.texts(".route").await.len() >= 9)
                    .await;
            }
            assert_eq!(shown.browser.value("window.moved").await, json!([]), "{page} at {width}");
        }
    }
}

#[tokio::test]
#[ignore = "needs a browser: make test-page"]
async fn one_of_a_kind_is_singular() {
    let pipeline = Pipeline::new().await;
    let (_gateway, address) = pipeline.gateway().await;
    let _generator = pipeline.generator(Parity::Even).await;
    pipeline.client.request(subjects::EVEN, "".into()).await.unwrap();
    pipeline.publish(1).await;
    let browser = Browser::start(&pipeline.scratch).await;
    browser.open(&format!("http://{address}/")).await;
    eventually("one number was given", async || {
        browser.text("[data-service=even] li").await.contains("1 number given\n")
    })
    .await;
    // The page extrapolates nothing, and says how far back it knows.
    assert_eq!(browser.text("#rate").await, "1");
    let span = browser.text("#span").await;
    assert!(span.starts_with("in the last ") && span.ends_with("\u{a0}s"), "{span}");
    let chart = browser.value("document.getElementById('chart').getAttribute('aria-label')").await;
    assert_eq!(chart, "1 number, from 432,306 to 432,306");
}

#[tokio::test]
#[ignore = "needs a browser: make test-page"]
async fn the_documentation_is_shown() {
    let shown = Shown::new(&[]).await;
    shown.browser.open(&format!("http://{}/docs", shown.address)).await;
    eventually("it is shown", async || shown.browser.texts(".route").await.len() >= 9).await;
    let text = shown.browser.text("main").await;
    let description = get(&shown.address, "/openapi.json", &[]).await.json();
    for path in description["paths"].as_object().unwrap().keys() {
        assert!(text.contains(path), "{path} is not shown");
    }
    let complaints = shown.browser.complaints().await;
    assert!(complaints.is_empty(), "{complaints:?}");
}
