// node-telegram-bot-api as its documentation has it.
import { Bot } from "node-telegram-bot-api";
import { run } from "node-telegram-bot-api/node";

const apiRoot = process.env.BOTLEASE_API_URL ?? process.env.TELEGRAM_API_URL;
const bot = new Bot(process.env.TELEGRAM_BOT_TOKEN, { apiRoot });
const work = Number(process.env.WORK) * 1000;
bot.on("message", async (ctx) => {
  await new Promise((resolve) => setTimeout(resolve, work));
  await ctx.reply("done", { reply_parameters: { message_id: ctx.message.message_id } });
});
await run(bot);
