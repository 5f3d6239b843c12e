# One image with every binary. BuildKit is needed (Docker 23 has it by default) for the caches.
FROM rust:1.95-slim-bookworm AS build
WORKDIR /build
# Binaries that run for years are worth the longer link.
ENV CARGO_PROFILE_RELEASE_LTO=thin
COPY . .
# The caches keep the crates, and what was compiled from them, apart from the code: after a change
# only our own crates are built again. They are no part of the image, so the binaries are copied out.
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/build/target,sharing=locked \
    # Cargo goes by the time of a file; another checkout, which has the same cache, may have newer ones.
    find services nats -type f -exec touch {} + \
    && cargo build --locked --release --workspace --bins \
    && mkdir /binaries /empty \
    && cd target/release && cp generator multiplier gateway evenodd /binaries/

# No shell, no package manager, not root.
FROM gcr.io/distroless/cc-debian12:nonroot
COPY --from=build /binaries/ /usr/local/bin/
# A new volume takes its owner from the folder of the image that it covers. So the job that makes
# the keys owns their volume, and the brokers own their stores, without any of them being root.
COPY --from=build --chown=10000:10000 /empty/ /keys/
COPY --from=build --chown=10010:10010 /empty/ /stores/nats-1/
COPY --from=build --chown=10010:10010 /empty/ /stores/nats-2/
COPY --from=build --chown=10010:10010 /empty/ /stores/nats-3/
