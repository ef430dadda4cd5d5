// pm2 start ecosystem.config.js: the processes that ./deploy_competitive.sh would start, with the settings of
// competitive.toml. ./deploy_competitive.sh FLAGS --save --only-prepare makes that file, and .venv.
const app = (name, seconds, more = {}) => ({
  name,
  cwd: __dirname,
  script: ".venv/bin/python",
  args: ["scripts/ops/serve.py", name],
  interpreter: "none",
  kill_timeout: seconds * 1000, // what is in flight is finished or spooled
  exp_backoff_restart_delay: 2000,
  out_file: "/dev/null", // they write and rotate logs/ themselves
  error_file: "/dev/null",
  ...more,
});

module.exports = {
  apps: [
    app("ray", 12, { stop_exit_codes: [0] }), // of a cluster; where the settings name none, it ends at once
    app("generation_service", 28, { stop_exit_codes: [0] }),
    app("rehearsal", 12, { autorestart: false }), // it ends at once where the settings name a wallet
    app("miner", 26, { stop_exit_codes: [0] }),
  ],
};
