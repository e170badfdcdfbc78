// Telegraf as its documentation has it, signals included.
import { Telegraf } from "telegraf";

// It handles a batch side by side. (Without the slash at the end it would leave "batch" away: new URL() does.)
const gateway = process.env.BOTLEASE_API_URL;
const apiRoot = gateway ? `${gateway}/batch/` : process.env.TELEGRAM_API_URL;
const bot = new Telegraf(process.env.TELEGRAM_BOT_TOKEN, { telegram: { apiRoot } });
const work = Number(process.env.WORK) * 1000;
bot.on("message", async (ctx) => {
  await new Promise((resolve) => setTimeout(resolve, work));
  await ctx.reply("done", { reply_parameters: { message_id: ctx.message.message_id } });
});
process.once("SIGINT", () => bot.stop("SIGINT"));
process.once("SIGTERM", () => bot.stop("SIGTERM"));
bot.launch();
