module.exports = {
  apps: [{
    name: "@APP@",
    script: "botlease",
    args: "run -- @START@",
    interpreter: "none",
    exec_mode: "fork",        // never cluster
    instances: 1,
    autorestart: true,
    kill_timeout: 60000,      // the default is 1600 ms, then SIGKILL
    restart_delay: 2000,
    env: { BOTLEASE_PLATFORM_GRACE: "60" },
  }],
};
