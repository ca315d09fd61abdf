# syntax=docker/dockerfile:1

FROM rust:1.95-slim-trixie AS build
WORKDIR /src
COPY Cargo.toml Cargo.lock build.rs ./
COPY .cargo .cargo
COPY proto proto
COPY migrations migrations
COPY src src
# Named in Cargo.toml, so that Cargo wants to see it.
COPY benches/hot.rs benches/hot.rs
RUN --mount=type=cache,target=/usr/local/cargo/registry,sharing=locked \
    --mount=type=cache,target=/src/target,sharing=locked \
    cargo build --release --locked --bin opamp-server \
    && install -D target/release/opamp-server /out/opamp-server

FROM debian:trixie-slim
LABEL org.opencontainers.image.title="opamp-server" \
      org.opencontainers.image.description="An OpAMP server that never lies about the fleet" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY LICENSE /usr/share/doc/opamp-server/copyright
COPY --from=build /out/opamp-server /usr/local/bin/opamp-server

# Inside a container loopback is reachable by nobody, so both listeners take all addresses. Each then needs its token
# (OPAMP_AGENTS_TOKEN_FILE, OPAMP_OPERATORS_TOKEN_FILE) or its allow_anonymous; without, the server refuses to start and
# says so. These two win over a file given with --config: change them in the environment.
ENV OPAMP_AGENTS_LISTEN=0.0.0.0:4320 \
    OPAMP_OPERATORS_LISTEN=0.0.0.0:4321
EXPOSE 4320 4321

# Where sqlite://opamp-server.db lies: mount a volume here, or set OPAMP_STORE_URL to Postgres.
RUN install -d -o 10001 -g 10001 -m 0750 /data
WORKDIR /data
USER 10001:10001

# Ready, not alive: unhealthy may just mean that the database is away, which needs no restart. It sees the environment,
# not the command line; with --config give the same to --health-cmd.
HEALTHCHECK --interval=10s --timeout=12s --start-period=30s CMD ["opamp-server", "healthcheck"]
# SIGTERM takes shutdown.drain and up to 5 s: stop it with a grace of 20 s (docker stop -t 20).
ENTRYPOINT ["opamp-server"]
