//! Service 4 answers as its description, `/openapi.json`, says.

use std::process::Command;

use serde_json::Value;
use tests::http::{Lines, get};
use tests::{Pipeline, eventually, repository};

async fn pipeline() -> (Pipeline, tests::Process, String) {
    let pipeline = Pipeline::new().await;
    for slot in 1..=300 {
        match slot {
            7 | 250 => pipeline.store(slot, b"no number".to_vec()).await,
            _ => pipeline.publish(slot).await,
        };
    }
    let (gateway, address) = pipeline.gateway().await;
    eventually("the gateway is ready", async || {
        get(&address, "/readyz", &[]).await.status == 200
            && get(&address, "/replicas", &[]).await.status == 200
    })
    .await;
    (pipeline, gateway, address)
}

/// Every described route answers with a described status and content type.
#[tokio::test]
async fn every_answer_is_described() {
    let (_pipeline, _gateway, address) = pipeline().await;
    let description = get(&address, "/openapi.json", &[]).await.json();
    assert_eq!(description["info"]["version"], env!("CARGO_PKG_VERSION"));
    let paths = description["paths"].as_object().unwrap();
    assert!(paths.len() >= 9);
    for (path, operations) in paths {
        for query in ["", "?limit=5", "?nonsense=1"] {
            let asked = path.replace("{seq}", "17") + query;
            let answer = Lines::open(&address, &asked, &[]).await;
            let content_type =
                answer.head.lines().find_map(|line| line.strip_prefix("content-type: "));
            let content_type = content_type.unwrap().split(';').next().unwrap();
            let status = answer.status.to_string();
            let mut described = &operations["get"]["responses"][&status];
            if let Some(reference) = described["$ref"].as_str() {
                described = description.pointer(&reference[1..]).unwrap();
            }
            assert!(described != &Value::Null, "GET {asked}: {status} is not described");
            let types = described["content"].as_object().unwrap();
            let known = types.keys().any(|known| known.split(';').next() == Some(content_type));
            assert!(known, "GET {asked}: {status} {content_type} is not described");
        }
    }
}

/// A proxy may have removed the beginning of the path.
#[tokio::test]
async fn every_link_is_relative() {
    let (_pipeline, _gateway, address) = pipeline().await;
    let is_relative = |link: &str| !link.starts_with('/') && !link.starts_with("http");
    let mut links = 0;
    for page in ["/", "/docs"] {
        let html = get(&address, page, &[]).await.body;
        for attribute in ["href=\"", "src=\""] {
            for link in html.split(attribute).skip(1).filter_map(|rest| rest.split('"').next()) {
                assert!(is_relative(link), "{page}: {link}");
                let is_file = !link.starts_with('#') && !link.starts_with("data:");
                let path = format!("/{}", link.trim_start_matches("./"));
                if is_file {
                    assert_eq!(Lines::open(&address, &path, &[]).await.status, 200, "{link}");
                    links += 1;
                }
            }
        }
    }
    assert!(links >= 10, "{links}");
    for script in ["/page.js", "/docs.js"] {
        let script = get(&address, script, &[]).await.body;
        for open in ["fetch(", "get(", "EventSource("] {
            for quote in ['"', '`', '\''] {
                assert!(!script.contains(&format!("{open}{quote}/")), "{open}{quote}/");
            }
        }
    }
    let description = get(&address, "/openapi.json", &[]).await.json();
    for server in description["servers"].as_array().unwrap() {
        assert!(is_relative(server["url"].as_str().unwrap()), "{server}");
    }
    let next = get(&address, "/history?limit=1", &[]).await;
    assert!(next.header("link").unwrap().starts_with("<?"), "{next:?}");
    assert!(is_relative(get(&address, "/docs/", &[]).await.header("location").unwrap()));
}

/// The page shows the threshold that the services use.
#[tokio::test]
async fn the_page_has_the_threshold() {
    let (_pipeline, _gateway, address) = pipeline().await;
    let threshold = contract::THRESHOLD.to_string();
    let page = get(&address, "/", &[]).await.body;
    assert!(page.contains(&format!("value=\"{threshold}\">{threshold}<")), "{page}");
    for file in ["index.html", "page.js", "docs.html", "docs.js", "page.css"] {
        let file = repository().join("services/gateway/page").join(file);
        let text = std::fs::read_to_string(&file).unwrap();
        assert!(!text.replace([',', '_'], "").contains(&threshold), "{}", file.display());
    }
}

#[tokio::test]
#[ignore = "needs schemathesis: make test-api"]
async fn schemathesis_finds_no_fault() {
    let (_pipeline, _gateway, address) = pipeline().await;
    let check = repository().join("tests/api/check");
    let run = move || Command::new(check).arg(format!("http://{address}")).status();
    let status = tokio::task::spawn_blocking(run).await.unwrap().unwrap();
    assert!(status.success());
}
