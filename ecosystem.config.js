// pm2 start ecosystem.config.js: the processes that ./deploy_competitive.sh would start, with the settings of
// competitive.toml (./deploy_competitive.sh FLAGS --save --only-prepare makes .venv and that file).
// Without a wallet the rehearsal: pm2 start ecosystem.config.js --env rehearsal is not needed, start it by name:
// pm2 start ecosystem.config.js --only rehearsal
const process = (name, script, seconds) => ({
  name,
  cwd: __dirname,
  script: ".venv/bin/python",
  args: ["scripts/ops/serve.py", script],
  interpreter: "none",
  kill_timeout: seconds * 1000, // what is in flight is finished or spooled
  exp_backoff_restart_delay: 2000,
  max_restarts: 1000000,
  out_file: "/dev/null", // they write and rotate logs/ themselves
  error_file: `run/${script}.out`,
});

module.exports = {
  apps: [process("generation", "generation_service", 28), process("miner", "miner", 26)],
};
