// grammY as its documentation has it, signals included.
import { Bot } from "grammy";

const apiRoot = process.env.BOTLEASE_API_URL ?? process.env.TELEGRAM_API_URL;
const bot = new Bot(process.env.TELEGRAM_BOT_TOKEN, { client: { apiRoot } });
const work = Number(process.env.WORK) * 1000;
bot.on("message", async (ctx) => {
  await new Promise((resolve) => setTimeout(resolve, work));
  await ctx.reply("done", { reply_parameters: { message_id: ctx.msg.message_id } });
});
process.once("SIGINT", () => bot.stop());
process.once("SIGTERM", () => bot.stop());
bot.start();
