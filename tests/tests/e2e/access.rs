//! Service 4: tokens.

use std::fs;

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use socket2::SockRef;
use tests::http::{Lines, get, request};
use tests::{Pipeline, Process, Scratch, eventually};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

const SECRET: &str = "0123456789abcdef0123456789abcdef";
const GUARDED: [&str; 7] = [
    "/numbers",
    "/numbers/1",
    "/numbers/live",
    "/history",
    "/history.csv",
    "/history.ndjson",
    "/replicas",
];

/// Writes a file to the test's directory and returns its path.
fn file(scratch: &Scratch, name: &str, content: &str) -> String {
    let path = scratch.path(name);
    fs::write(&path, content).unwrap();
    path.to_str().unwrap().to_owned()
}

/// A token from `evenodd token`.
async fn token(scratch: &Scratch, args: &[&str]) -> String {
    let args = [&["token"], args].concat();
    let mut process = Process::start(scratch, "evenodd", &args);
    assert!(process.wait().await.success(), "{}", process.log());
    process.log().trim().to_owned()
}

/// The status of a request with this token.
async fn with_token(address: &str, path: &str, token: &str) -> u16 {
    let header = format!("Authorization: Bearer {token}");
    Lines::open(address, path, &[&header]).await.status
}

#[tokio::test]
async fn with_a_key_all_data_needs_a_token() {
    let pipeline = Pipeline::new().await;
    let key = file(&pipeline.scratch, "key", &format!("{SECRET}\n"));
    let (mut gateway, address) =
        pipeline.gateway_with(&["--jwt-secret", &key, "--log", "debug"]).await;
    pipeline.publish(1).await;
    eventually("ready", async || get(&address, "/readyz", &[]).await.status == 200).await;
    assert_eq!(get(&address, "/healthz", &[]).await.status, 200);
    assert_eq!(request(&address, "OPTIONS", "/numbers", &[]).await.status, 204);
    for open in ["/", "/page.js", "/docs", "/openapi.json"] {
        assert_eq!(get(&address, open, &[]).await.status, 200, "{open}");
    }
    let good = token(&pipeline.scratch, &["--secret", &key]).await;
    eventually("everything is there", async || {
        with_token(&address, "/numbers/1", &good).await == 200
            && with_token(&address, "/replicas", &good).await == 200
    })
    .await;
    for path in GUARDED {
        let without = get(&address, path, &[]).await;
        assert_eq!(without.status, 401, "{path}");
        assert_eq!(without.header("www-authenticate"), Some("Bearer realm=\"evenodd\""));
        assert_eq!(with_token(&address, path, &good).await, 200, "{path}");
        // Only the live feed accepts a token in the query.
        let in_query = format!("{path}?access_token={good}");
        let expected = if path == "/numbers/live" { 200 } else { 401 };
        assert_eq!(Lines::open(&address, &in_query, &[]).await.status, expected, "{path}");
    }
    let wrong = get(&address, "/numbers", &["Authorization: Bearer nonsense"]).await;
    assert!(wrong.header("www-authenticate").unwrap().ends_with("error=\"invalid_token\""));
    // A proxy in front may have a user and a password of its own.
    let (basic, bearer) = ("Authorization: Basic eDp5", format!("Authorization: bearer {good}"));
    let live = format!("/numbers/live?access_token={good}");
    for (path, headers, expected) in [
        ("/numbers", &[basic][..], 401),
        ("/numbers", &[basic, &bearer], 200),
        ("/numbers", &[&bearer, basic], 200),
        ("/numbers/live", &[basic], 401),
        (&live, &[basic], 200),
        (&live, &["Authorization: Bearer"], 200),
        // A token in a header takes precedence.
        (&live, &["Authorization: Bearer nonsense"], 401),
        ("/numbers", &["Authorization: Bearer nonsense", &bearer], 401),
    ] {
        let status = Lines::open(&address, path, headers).await.status;
        assert_eq!(status, expected, "{path}: {headers:?}");
    }
    gateway.wait_for("path=\"/numbers/live\" status=200").await;
    let log = gateway.log();
    assert!(log.contains("path=\"/numbers\" status=401"), "{log}");
    assert!(!log.contains(&good[..20]), "a token is in the log");
}

#[tokio::test]
async fn every_kind_of_key_is_accepted() {
    let pipeline = Pipeline::new().await;
    let scratch = &pipeline.scratch;
    for (name, algorithm) in [
        ("rsa", &rcgen::PKCS_RSA_SHA256),
        ("ec", &rcgen::PKCS_ECDSA_P256_SHA256),
        ("ed", &rcgen::PKCS_ED25519),
        ("p384", &rcgen::PKCS_ECDSA_P384_SHA384),
    ] {
        let pair = rcgen::KeyPair::generate_for(algorithm).unwrap();
        file(scratch, name, &pair.serialize_pem());
        file(scratch, &format!("{name}.pub"), &pair.public_key_pem());
    }
    let path = |name: &str| scratch.path(name).to_str().unwrap().to_owned();
    file(scratch, "secret", SECRET);
    let secret_jwk = json!({
        "kty": "oct", "kid": "s", "alg": "HS256",
        "k": "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY",
    });
    let for_encryption =
        json!({ "kty": "RSA", "kid": "e", "use": "enc", "n": "AQAB", "e": "AQAB" });
    file(scratch, "set", &json!({ "keys": [for_encryption, secret_jwk] }).to_string());
    let kinds = [
        ("--secret", "secret", "--jwt-secret", "secret"),
        ("--key", "rsa", "--jwt-key", "rsa.pub"),
        ("--key", "ec", "--jwt-key", "ec.pub"),
        ("--key", "ed", "--jwt-key", "ed.pub"),
        ("--secret", "secret", "--jwt-key", "set"),
    ];
    let mut tokens = Vec::new();
    for (flag, private, ..) in kinds {
        tokens.push(token(scratch, &[flag, &path(private)]).await);
    }
    for (at, (.., flag, public)) in kinds.iter().enumerate() {
        let (mut gateway, address) = pipeline.gateway_with(&[flag, &path(public)]).await;
        eventually("ready", async || get(&address, "/readyz", &[]).await.status == 200).await;
        for (of, token) in tokens.iter().enumerate() {
            // The secret and the set with it are the same key.
            let same = at == of || [at, of] == [0, 4] || [at, of] == [4, 0];
            let expected = if same { 200 } else { 401 };
            assert_eq!(with_token(&address, "/numbers", token).await, expected, "{public}: {of}");
        }
        let algorithm = ["HS256", "RS256", "ES256", "EdDSA", "HS256"][at];
        let line = gateway.wait_for("accepting tokens of this key").await;
        assert!(line.contains(&format!("algorithm={algorithm}")), "{line}");
        if *public == "set" {
            assert!(line.contains("kid=\"s\""), "{line}");
            gateway.wait_for("not used: key e: it is not for signatures").await;
        }
        assert!(!gateway.log().contains(SECRET), "the secret is in the log");
        drop(gateway);
    }
    // A token must not use the public key as an HMAC secret (RFC 8725, section 2.1), even if the
    // key does not start at the beginning of its file.
    let public = fs::read_to_string(path("rsa.pub")).unwrap();
    let shifted = format!("\n{public}");
    let shifted_file = file(scratch, "shifted", &shifted);
    let in_an_hour = std::time::SystemTime::now() + std::time::Duration::from_secs(3600);
    let claims = json!({
        "exp": in_an_hour.duration_since(std::time::UNIX_EPOCH).unwrap().as_secs(),
    });
    let (_gateway, address) = pipeline.gateway_with(&["--jwt-key", &shifted_file]).await;
    eventually("ready", async || get(&address, "/readyz", &[]).await.status == 200).await;
    assert_eq!(with_token(&address, "/numbers", &tokens[1]).await, 200);
    for secret in [&*public, &*shifted, public.trim()] {
        let confused = hs256(secret, &json!({ "alg": "HS256" }), &claims);
        assert_eq!(with_token(&address, "/numbers", &confused).await, 401);
    }

    let weak = json!({ "keys": [{ "kty": "RSA", "n": "3q2-7w", "e": "AQAB" }] });
    // The key that Keycloak shows for a realm: a public key in PEM, without its first and last line.
    let bare: String = public.lines().filter(|line| !line.starts_with('-')).collect();
    for (flag, name, hint) in [
        ("--jwt-key", "rsa", "PRIVATE KEY"),
        ("--jwt-key", "p384.pub", "P-256"),
        ("--jwt-key", "absent", "No such file"),
        ("--jwt-key", "secret", "give a secret with --jwt-secret"),
        ("--jwt-key", &*file(scratch, "none", r#"{"keys":[]}"#), "none of its keys"),
        ("--jwt-key", &*file(scratch, "json", "{"), "no JWKS"),
        ("--jwt-key", &*file(scratch, "weak", &weak.to_string()), "2048 to 8192 bits"),
        ("--jwt-key", "", "not a regular file"),
        ("--jwt-key", &*file(scratch, "pem", "-----BEGIN PUBLIC KEY-----\nx\n"), "no public key"),
        ("--jwt-secret", "absent", "No such file"),
        ("--jwt-secret", &*file(scratch, "short", "secret"), "32 bytes"),
        ("--jwt-secret", &*file(scratch, "empty", "\n"), "none of its keys"),
        ("--jwt-secret", &*file(scratch, "der", &"\u{1}0".repeat(40)), "no secret"),
        ("--jwt-secret", &*file(scratch, "bare", &bare), "give public keys with --jwt-key"),
        ("--jwt-secret", "rsa.pub", "give public keys with --jwt-key"),
        ("--jwt-secret", "set", "give public keys with --jwt-key"),
    ] {
        let key = scratch.path(name);
        let args = [flag, key.to_str().unwrap(), "--http", "127.0.0.1:0"];
        let mut gateway = Process::start(scratch, "gateway", &args);
        let status = gateway.wait().await;
        let log = gateway.log();
        assert!(
            status.code() == Some(2) && log.contains(hint) && log.contains(flag),
            "{name}: {log}"
        );
    }
}

#[tokio::test]
async fn claims_are_checked() {
    let pipeline = Pipeline::new().await;
    let key = file(&pipeline.scratch, "key", SECRET);
    let args = ["--jwt-secret", &key, "--jwt-audience", "readers", "--jwt-issuer", "us"];
    let (_gateway, address) = pipeline.gateway_with(&args).await;
    eventually("ready", async || get(&address, "/readyz", &[]).await.status == 200).await;
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let good = json!({ "exp": now + 60, "aud": "readers", "iss": "us" });
    let sign = |algorithm: &str, claims: &Value| {
        hs256(SECRET, &json!({ "alg": algorithm, "typ": "JWT" }), claims)
    };
    assert_eq!(with_token(&address, "/numbers", &sign("HS256", &good)).await, 200);
    let changed = |name: &str, value: Value| {
        let mut claims = good.clone();
        claims[name] = value;
        claims
    };
    for (what, claims) in [
        ("expired", changed("exp", (now - 60).into())),
        ("without an expiry", changed("exp", Value::Null)),
        ("an expiry that is text", changed("exp", "9999999999".into())),
        ("not valid yet", changed("nbf", (now + 60).into())),
        ("for another audience", changed("aud", "writers".into())),
        ("without an audience", changed("aud", Value::Null)),
        ("by another issuer", changed("iss", "them".into())),
    ] {
        assert_eq!(with_token(&address, "/numbers", &sign("HS256", &claims)).await, 401, "{what}");
    }
    // An expiry within the tolerance for clocks, and several audiences.
    let claims = changed("exp", (now - 3).into());
    assert_eq!(with_token(&address, "/numbers", &sign("HS256", &claims)).await, 200);
    let claims = changed("aud", json!(["writers", "readers"]));
    assert_eq!(with_token(&address, "/numbers", &sign("HS256", &claims)).await, 200);
    // Algorithms other than the key's, and none at all.
    for algorithm in ["HS384", "none", "RS256"] {
        assert_eq!(with_token(&address, "/numbers", &sign(algorithm, &good)).await, 401);
    }
    let critical = json!({ "alg": "HS256", "crit": ["x"], "x": 1 });
    let critical = hs256(SECRET, &critical, &good);
    assert_eq!(with_token(&address, "/numbers", &critical).await, 401);
    let mut forged = sign("HS256", &good);
    forged.truncate(forged.rfind('.').unwrap() + 1);
    assert_eq!(with_token(&address, "/numbers", &forged).await, 401);
}

/// A token with an arbitrary header, signed with HMAC SHA-256.
fn hs256(secret: &str, header: &Value, claims: &Value) -> String {
    use jsonwebtoken::{Algorithm, EncodingKey, crypto};
    let key = EncodingKey::from_secret(secret.as_bytes());
    let [header, claims] = [header, claims].map(|part| base64(part.to_string().as_bytes()));
    let message = format!("{header}.{claims}");
    let signature = crypto::sign(message.as_bytes(), &key, Algorithm::HS256).unwrap();
    format!("{message}.{signature}")
}

fn base64(bytes: &[u8]) -> String {
    use base64::Engine;
    base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(bytes)
}

/// The steps in docs/http-api.md: add the new key, wait until tokens of the old one have expired,
/// and remove the old key.
#[tokio::test]
async fn a_key_is_replaced_without_a_gap() {
    let pipeline = Pipeline::new().await;
    let scratch = &pipeline.scratch;
    let pair = |name: &str| {
        let pair = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
        let point = pair.public_key_raw();
        let (x, y) = (base64(&point[1..33]), base64(&point[33..]));
        let jwk = json!({ "kty": "EC", "crv": "P-256", "x": x, "y": y });
        (file(scratch, name, &pair.serialize_pem()), pair.public_key_pem(), jwk)
    };
    let ((old_key, old_pem, old_jwk), (new_key, new_pem, new_jwk)) = (pair("old"), pair("new"));
    let (old_secret, new_secret) = (SECRET, "fedcba9876543210fedcba9876543210");
    let set = |keys: &[(&Value, &str)]| {
        let keys = keys.iter().map(|(key, kid)| {
            let mut key = (*key).clone();
            if !kid.is_empty() {
                key["kid"] = (*kid).into();
            }
            key
        });
        json!({ "keys": keys.collect::<Vec<_>>() }).to_string()
    };
    let kid = |jwk, id| set(&[(jwk, id)]);
    // The flag and the file for the old key, for both keys, and for the new one; how to sign.
    for (flag, old, both, new, sign_old, sign_new) in [
        (
            "--jwt-secret",
            format!("{old_secret}\n"),
            format!("{new_secret}\n{old_secret}\n"),
            format!("{new_secret}\n"),
            vec!["--secret", "<file>"],
            vec!["--secret", "<file>"],
        ),
        (
            "--jwt-key",
            old_pem.clone(),
            new_pem.clone() + &old_pem,
            new_pem,
            vec!["--key", &old_key],
            vec!["--key", &new_key],
        ),
        (
            "--jwt-key",
            set(&[(&old_jwk, "")]),
            set(&[(&old_jwk, ""), (&new_jwk, "")]),
            set(&[(&new_jwk, "")]),
            vec!["--key", &old_key],
            vec!["--key", &new_key, "--kid", "any"],
        ),
        (
            "--jwt-key",
            kid(&old_jwk, "a"),
            set(&[(&old_jwk, "a"), (&new_jwk, "b")]),
            kid(&new_jwk, "b"),
            vec!["--key", &old_key],
            vec!["--key", &new_key, "--kid", "b"],
        ),
    ] {
        let path = file(scratch, "keys", &old);
        let sign = async |args: &[&str]| {
            let args: Vec<_> = args.iter().map(|arg| arg.replace("<file>", &path)).collect();
            token(scratch, &args.iter().map(String::as_str).collect::<Vec<_>>()).await
        };
        let old_token = sign(&sign_old).await;
        let (mut gateway, address) = pipeline.gateway_with(&[flag, &path]).await;
        eventually("ready", async || get(&address, "/readyz", &[]).await.status == 200).await;
        let status = async |token: &str| with_token(&address, "/numbers", token).await;
        assert_eq!(status(&old_token).await, 200, "{both}");
        // An unusable file changes nothing.
        fs::write(&path, "short").unwrap();
        gateway.signal(Signal::SIGHUP);
        gateway.wait_for("stay as they were").await;
        assert_eq!(status(&old_token).await, 200, "{both}");
        fs::write(&path, both).unwrap();
        let new_token = sign(&sign_new).await;
        assert_eq!(status(&new_token).await, 401, "the file is read at SIGHUP only");
        let mut reads = 0;
        let mut read_again = async || {
            gateway.signal(Signal::SIGHUP);
            reads += 1;
            let count = |log: &str| log.matches("were read again").count();
            gateway.until("it is read", async |p| (count(&p.log()) == reads).then_some(())).await;
        };
        read_again().await;
        assert_eq!([status(&old_token).await, status(&new_token).await], [200, 200]);
        fs::write(&path, new).unwrap();
        read_again().await;
        assert_eq!([status(&old_token).await, status(&new_token).await], [401, 200]);
    }
}

/// From a secret to public keys, with both flags.
#[tokio::test]
async fn a_secret_and_public_keys_together() {
    let pipeline = Pipeline::new().await;
    let scratch = &pipeline.scratch;
    let pair = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
    let private = file(scratch, "ed", &pair.serialize_pem());
    let jwk =
        json!({ "kty": "OKP", "crv": "Ed25519", "kid": "a", "x": base64(pair.public_key_raw()) });
    let public = file(scratch, "set", &json!({ "keys": [jwk] }).to_string());
    let secret = file(scratch, "secret", SECRET);
    let args = ["--jwt-secret", &secret, "--jwt-key", &public];
    let (mut gateway, address) = pipeline.gateway_with(&args).await;
    eventually("ready", async || get(&address, "/readyz", &[]).await.status == 200).await;
    for (args, expected) in [
        (vec!["--secret", &secret], 200),
        (vec!["--secret", &secret, "--kid", "of the issuer"], 200),
        (vec!["--key", &private], 200),
        (vec!["--key", &private, "--kid", "a"], 200),
        (vec!["--key", &private, "--kid", "b"], 401),
    ] {
        let token = token(scratch, &args).await;
        assert_eq!(with_token(&address, "/numbers", &token).await, expected, "{args:?}");
    }
    // Both files are read again, or none.
    let old = token(scratch, &["--secret", &secret]).await;
    fs::write(&secret, "fedcba9876543210fedcba9876543210").unwrap();
    fs::write(&public, "nonsense").unwrap();
    gateway.signal(Signal::SIGHUP);
    gateway.wait_for("stay as they were: --jwt-key").await;
    assert_eq!(with_token(&address, "/numbers", &old).await, 200);
}

/// `evenodd token` is told what to sign with, and once.
#[tokio::test]
async fn a_token_is_signed_with_one_key() {
    let scratch = Scratch::new();
    let secret = file(&scratch, "secret", SECRET);
    for args in [
        &["token"][..],
        &["token", "--key", &secret],
        &["token", "--secret", &secret, "--key", &secret],
        &["token", "--secret", "/nowhere/secret"],
    ] {
        let mut process = Process::start(&scratch, "evenodd", args);
        assert_eq!(process.wait().await.code(), Some(2), "{args:?}: {}", process.log());
    }
}

/// An open feed ends when its token expires.
#[tokio::test]
async fn a_feed_ends_with_its_token() {
    let pipeline = Pipeline::new().await;
    let key = file(&pipeline.scratch, "key", SECRET);
    let (_gateway, address) = pipeline.gateway_with(&["--jwt-secret", &key]).await;
    eventually("ready", async || get(&address, "/readyz", &[]).await.status == 200).await;
    let short = token(&pipeline.scratch, &["--secret", &key, "--valid-s", "1"]).await;
    let path = format!("/numbers/live?access_token={short}");
    let mut live = Lines::open(&address, &path, &[]).await;
    assert_eq!(live.status, 200);
    // After one second, and the ten seconds by which clocks may differ.
    let event = live.event().await.unwrap();
    assert_eq!(event.name, "expired");
    assert!(live.event().await.is_none());
}

/// A feed also ends if its client lags far behind.
#[tokio::test]
async fn a_feed_that_is_behind_ends_with_its_token() {
    let pipeline = Pipeline::new().await;
    for slot in 1..=3000 {
        pipeline.publish(slot).await;
    }
    let key = file(&pipeline.scratch, "key", SECRET);
    let (_gateway, address) = pipeline.gateway_with(&["--jwt-secret", &key]).await;
    eventually("ready", async || get(&address, "/readyz", &[]).await.status == 200).await;
    let short = token(&pipeline.scratch, &["--secret", &key, "--valid-s", "1"]).await;
    let mut stream = TcpStream::connect(&address).await.unwrap();
    SockRef::from(&stream).set_recv_buffer_size(4096).unwrap();
    let ask = format!("GET /numbers/live?after=0&access_token={short} HTTP/1.0\r\n\r\n");
    stream.write_all(ask.as_bytes()).await.unwrap();
    let mut live = Lines::over(stream).await;
    let begun = std::time::Instant::now();
    let (mut last, mut event) = (0, live.event().await.unwrap());
    while event.name == "number" {
        last = event.id;
        // It reads so slowly that it would need minutes for the whole history.
        if last % 10 == 0 && begun.elapsed().as_secs() < 14 {
            tokio::time::sleep(std::time::Duration::from_millis(300)).await;
        }
        event = live.event().await.unwrap();
    }
    assert_eq!(event.name, "expired");
    assert!(last < 3000, "it read everything");
    assert!(live.event().await.is_none());
}
