// Applied with `railway config apply`. (railway.json and railway.toml are no longer read from 2026-12-01 on.)
import { defineRailway, postgres, preserve, project, service } from "railway/iac";

export default defineRailway(() => {
  const db = postgres("postgres");
  const bot = service("@APP@", {
    replicas: 1,
    deploy: {
      startCommand: "botlease run --health-port $PORT --health-host 0.0.0.0 --stop-grace 40 -- @START@",
      // Railway keeps the old one until this says 200: by then it has handed over, and the new one has proved itself.
      healthcheckPath: "/health",
      healthcheckTimeout: 300,
      restartPolicyType: "ON_FAILURE",
      restartPolicyMaxRetries: 10,
      drainingSeconds: 45,
      overlapSeconds: 0,
    },
    env: {
      DATABASE_URL: db.env.DATABASE_URL,
      BOT_TOKEN: preserve(),
      BOTLEASE_ENVIRONMENT: "production",
      // `railway config migrate` drops drainingSeconds; the variable stays, and botlease can read it.
      RAILWAY_DEPLOYMENT_DRAINING_SECONDS: "45",
    },
  });
  return project("@APP@", { resources: [db, bot] });
});
